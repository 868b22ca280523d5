"""The prompt: the same ids as transformers' own template, with images expanded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from broker_schemas.errors import DataError
from broker_schemas.method.prompt import PromptBuilder, num_image_tokens

TEMPLATE_WITH_EVERYTHING = """{%- macro show(part) %}
    {%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
    {%- else %}{{ part.text }}{% endif %}
{%- endmacro %}
{%- for message in messages %}
    {%- if loop.index > 9 %}
        {%- break %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- for part in message.content %}
        {{- show(part) }}
    {%- endfor %}
    {{- {'é': "<b>&'"} | tojson }}{{ eos_token }}

{% endfor %}
{%- if add_generation_prompt and not tools %}<|im_start|>assistant
{% endif %}"""


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_the_prompt_is_chatml_with_the_image_before_the_instruction(tiny_folder: Path) -> None:
    builder = PromptBuilder(tiny_folder, system_prompt="Be exact.", instruction="List all.")

    assert builder.build_text() == (
        "<|im_start|>system\nBe exact.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>List all.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.req("M-11")
@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("system_prompt", ["Finde jedes Objekt. é 猫", ""])
def test_prompt_ids_equal_those_of_transformers(
    tiny_folder: Path, num_images: int, system_prompt: str
) -> None:
    builder = PromptBuilder(tiny_folder, system_prompt=system_prompt)
    reference = AutoTokenizer.from_pretrained(tiny_folder)

    expected = reference.apply_chat_template(builder.messages(num_images), add_generation_prompt=True)

    # a grid of 2x2 patches is one image token: nothing to expand
    assert builder.build_ids([(1, 2, 2)] * num_images).tolist() == list(expected["input_ids"])


def test_a_template_with_macros_breaks_and_json_renders_as_transformers_renders_it(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE_WITH_EVERYTHING, encoding="utf-8")
    builder = PromptBuilder(folder)

    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        builder.messages(1), add_generation_prompt=True, tokenize=False
    )

    assert builder.build_text(1) == expected
    assert "<b>&'" in expected


def test_each_image_expands_to_its_own_number_of_tokens(tiny_folder: Path) -> None:
    builder = PromptBuilder(tiny_folder)

    ids = builder.build_ids([(1, 8, 8), (1, 4, 6)])

    is_image = ids == builder.image_token_id
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], is_image.astype(int), [0]]))))[::2]
    assert ids.dtype == np.int32
    assert runs.tolist() == [16, 6]
    assert len(ids) == len(builder.build_ids([(1, 2, 2)] * 2)) + 15 + 5
    assert not ids.flags.writeable


def test_tokens_that_others_rely_on_are_looked_up(tiny_folder: Path) -> None:
    builder = PromptBuilder(tiny_folder)

    assert builder.tokenizer.id_to_token(builder.end_token_id) == "<|im_end|>"
    assert builder.tokenizer.id_to_token(builder.image_token_id) == "<|image_pad|>"
    assert builder.tokenizer.id_to_token(int(builder.coord_vocab.ids[417])) == "<|coord_417|>"


@pytest.mark.parametrize("grid", [(1, 3, 4), (1, 4, 3), (0, 4, 4)])
def test_a_grid_that_the_merge_size_does_not_divide_is_refused(grid: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="grid_thw: got"):
        num_image_tokens(grid, 2)


def _edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def test_a_template_in_json_serves_where_there_is_no_template_file(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    expected = PromptBuilder(tiny_folder).build_text()

    _edit_json(folder / "tokenizer_config.json", chat_template=named)
    assert PromptBuilder(folder).build_text() == expected
    _edit_json(folder / "tokenizer_config.json", chat_template=template)
    assert PromptBuilder(folder).build_text() == expected
    _edit_json(folder / "tokenizer_config.json", chat_template=None)
    with pytest.raises(DataError, match="no chat template in .*instruction-tuned"):
        PromptBuilder(folder)


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ strftime_now('%d %B') }}", "asks for the date"),
        ("{{ raise_exception('no system prompt') }}", "no system prompt"),
        ("nothing of an image", "wrote 0 <|image_pad|> for 1 images"),
    ],
)
def test_a_template_that_cannot_give_the_same_prompt_every_day_is_refused(
    tiny_folder: Path, tmp_path: Path, template: str, reason: str
) -> None:
    folder = copy_of(tiny_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    with pytest.raises(DataError) as refusal:
        PromptBuilder(folder).build_ids([(1, 2, 2)])

    assert reason in str(refusal.value)
    assert str(folder) in str(refusal.value)


def test_a_folder_that_is_no_model_is_named_with_the_remedy(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no tokenizer\.json.*rollstream model tiny"):
        PromptBuilder(tmp_path / "nowhere")
    folder = copy_of(tiny_folder, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer file"):
        PromptBuilder(folder)


@pytest.mark.req("M-11")
def test_a_tokenizer_without_all_coordinate_tokens_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder, tmp_path / "model")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace("<|coord_500|>", "<|kord_500|>"), encoding="utf-8")

    with pytest.raises(DataError, match=r"1 of 1000 tokens are not in the tokenizer, first <\|coord_500\|>"):
        PromptBuilder(folder)


def test_the_merge_size_comes_from_the_processor_or_the_model_config(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_folder, tmp_path / "model")
    _edit_json(folder / "preprocessor_config.json", merge_size=None)
    assert PromptBuilder(folder).merge_size == 2
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match="no merge_size"):
        PromptBuilder(folder)
