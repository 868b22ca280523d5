"""The tiny model: an ordinary folder that loads, runs, and comes out the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from broker_schemas.errors import DataError
from broker_schemas.method.coordinates import CoordVocabulary
from broker_schemas.method.images import ImageProcessor
from broker_schemas.method.model_folder import load_policy
from broker_schemas.method.payload import render_payload
from broker_schemas.method.prompt import PromptBuilder, load_tokenizer
from broker_schemas.records.records import GroundTruthObject
from consumers.joins import examine_join
from rollstream.models.tiny_model import PRESETS, TinySizes, make_tiny_model
from tests.builders.datasets import tree_bytes, write_picture

BOX = GroundTruthObject(desc="three", geometry="bbox_2d", bins=(406, 368, 767, 784))
POLYGON = GroundTruthObject(desc="leaf", geometry="poly", bins=(1, 2, 30, 4, 15, 60))


def pieces(tokenizer: object, text: str) -> list[str]:
    return [tokenizer.decode([i]) for i in tokenizer(text).input_ids]  # type: ignore[operator, attr-defined]


def test_the_folder_loads_through_the_auto_classes(tiny_folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    processor = AutoImageProcessor.from_pretrained(tiny_folder)

    assert AutoConfig.from_pretrained(tiny_folder).model_type == "qwen3_vl"
    assert 3_000_000 < model.num_parameters() < 4_000_000
    assert len(tokenizer) == model.config.text_config.vocab_size
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(model.config.image_token_id) == "<|image_pad|>"
    assert (processor.patch_size, processor.merge_size) == (16, 2)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.req("M-11")
def test_the_vocabulary_holds_exactly_1000_coordinates_and_the_wildcard_is_none(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    vocabulary = CoordVocabulary.from_token_to_id(tokenizer.get_vocab().get)

    assert len(set(vocabulary.ids.tolist())) == 1000
    assert tokenizer.convert_tokens_to_ids("<|coord_*|>") not in vocabulary.bin_by_id
    assert len(tokenizer) <= 256 + 640 + 8 + 1001


def test_structure_takes_few_tokens_and_the_model_decides_in_one_after_each_object(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    found = pieces(tokenizer, render_payload([BOX, POLYGON]).text + "<|im_end|>")

    assert " ".join(found) == (
        '{"object_ 1 ": {"desc": " three ", "bbox_2d": [" '
        '<|coord_406|> ", " <|coord_368|> ", " <|coord_767|> ", " <|coord_784|> "]}, '
        ' "object_ 2 ": {"desc": " leaf ", "poly": [[" '
        '<|coord_1|> ", " <|coord_2|> "], [" <|coord_30|> ", " <|coord_4|> "], [" '
        '<|coord_15|> ", " <|coord_60|> "]]}} <|im_end|>'
    )


@pytest.mark.req("M-6")
def test_going_on_and_ending_are_tokens_that_reach_into_what_is_kept(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)

    report = examine_join(tokenizer, CoordVocabulary.from_token_to_id(tokenizer.token_to_id))

    assert report.is_exact
    assert (report.going_on, report.ending) == (('`"]},`',), ('`"]}}`',))


def test_any_text_survives_the_tokenizer(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    text = 'Ünïcode 猫🙂 "quoted"\\n\t 3,14 [[{]}] <|coord_7|> object_12'

    assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_equal_seeds_give_equal_bytes_and_another_seed_other_weights(
    tiny_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(99)
    again = make_tiny_model(tmp_path / "again", seed=3).folder
    state_after = torch.random.get_rng_state()
    other = make_tiny_model(tmp_path / "other", seed=4).folder

    assert tree_bytes(again) == tree_bytes(tiny_folder)
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()
    assert torch.equal(torch.random.get_rng_state(), state_after)


def test_neighbouring_bins_and_patch_positions_begin_alike_and_far_ones_do_not(tiny_folder: Path) -> None:
    model = load_policy(tiny_folder)
    rows = PromptBuilder(tiny_folder).coord_vocab.ids.tolist()
    bins = torch.nn.functional.normalize(model.get_input_embeddings().weight[rows], dim=1)
    grid = torch.nn.functional.normalize(model.model.visual.pos_embed.weight, dim=1).reshape(8, 8, -1)

    assert (bins[:-1] * bins[1:]).sum(1).min() > 0.9
    assert (bins[:-300] * bins[300:]).sum(1).max() < 0.7
    assert (grid[:, :-1] * grid[:, 1:]).sum(2).mean() > (grid[:, :-4] * grid[:, 4:]).sum(2).mean() + 0.2
    assert (grid[:-1] * grid[1:]).sum(2).mean() > (grid[:-4] * grid[4:]).sum(2).mean() + 0.2
    assert 0.01 < model.get_input_embeddings().weight[rows].std() < 0.03
    assert 0.2 < model.model.visual.pos_embed.weight.std() < 0.4


def test_it_sees_the_picture_and_generates(tiny_folder: Path, tmp_path: Path) -> None:
    write_picture(tmp_path / "dark.png", 128, 128, colour=(10, 10, 10))
    write_picture(tmp_path / "light.png", 128, 128, colour=(250, 250, 250))
    processor = ImageProcessor(tiny_folder, tmp_path)
    builder = PromptBuilder(tiny_folder)
    model = load_policy(tiny_folder)
    last_logits = []
    for name in ("dark.png", "light.png"):
        pixel_values, grid = processor.load(name)
        ids = torch.tensor(builder.build_ids([grid]).tolist())[None]
        inputs = {
            "input_ids": ids,
            "mm_token_type_ids": (ids == builder.image_token_id).int(),
            "pixel_values": pixel_values,
            "image_grid_thw": torch.tensor([grid]),
        }
        with torch.no_grad():
            last_logits.append(model(**inputs).logits[0, -1])
            written = model.generate(**inputs, attention_mask=torch.ones_like(ids), max_new_tokens=4)

    assert grid == (1, 8, 8)
    assert written.shape[1] <= ids.shape[1] + 4
    assert not torch.allclose(last_logits[0], last_logits[1])


def test_the_photos_preset_gives_a_photograph_108_image_tokens(tmp_path: Path) -> None:
    write_picture(tmp_path / "photo.jpg", 640, 480)
    folder = make_tiny_model(tmp_path / "photos", preset="photos").folder

    _, grid = ImageProcessor(folder, tmp_path).load("photo.jpg")

    assert len(PromptBuilder(folder).build_ids([grid])) - len(PromptBuilder(folder).build_ids([])) == 108 + 2


def test_other_sizes_are_taken_and_recorded(tmp_path: Path) -> None:
    sizes = TinySizes(text_hidden=64, text_heads=2, text_key_value_heads=1, text_layers=2, vision_layers=2)

    summary = make_tiny_model(tmp_path / "small", sizes=sizes)

    assert summary.num_parameters == load_policy(summary.folder).num_parameters() < 1_600_000
    marker = json.loads((summary.folder / "made_by_rollstream.json").read_text())
    assert marker["arguments"]["sizes"]["text_hidden"] == 64


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"text_heads": 5}, "got 192 for 5 heads, expected a multiple of 10"),
        ({"text_key_value_heads": 4}, "got 6 for 4 heads"),
        ({"vision_heads": 64}, "got 128 for 64 heads, expected a multiple of 256"),
        ({"deepstack_layers": (3,)}, "expected at most 4 numbers from 0 to 2"),
        ({"deepstack_layers": (0, 1), "text_layers": 1}, "expected at most 1 numbers"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, int], expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        make_tiny_model(tmp_path / "model", sizes=TinySizes(**changes))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_preset_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"got preset 'huge', expected one of {', '.join(PRESETS)}"):
        make_tiny_model(tmp_path / "model", preset="huge")  # type: ignore[arg-type]
