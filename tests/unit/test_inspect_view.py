"""One rollout shown: the role of every token, the verdict on every object, the shapes on its image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console, RenderableType

from broker_schemas.method.adapter_folder import write_adapter
from broker_schemas.method.adapters import AdapterPlan, BaseModel
from rollstream.models.shipped import SHIPPED_MODEL
from rollstream.run_folder import RunFolder
from rollstream.show.drawing import GROUND_TRUTH_COLOUR, PREDICTION_COLOUR
from rollstream.show.inspect_view import (
    STYLES,
    InspectedObject,
    draw_inspection,
    render_inspection,
    sequence_text,
    token_roles,
)
from rollstream.show.inspecting import base_of
from tests.builders.configs import load_mapping, make_mapping
from tests.builders.inspections import (
    APPENDED,
    PREFIX,
    PROMPT,
    make_inspection,
    make_matched,
    make_segment,
    token_text,
)


def shown(view: RenderableType, width: int = 100) -> str:
    stream = io.StringIO()
    Console(width=width, file=stream, color_system=None).print(view)
    return stream.getvalue()


def styled(text_style: str, role_pieces: list[tuple[str, str]]) -> str:
    return "".join(piece for piece, style in role_pieces if style.startswith(text_style) and text_style)


def test_every_token_has_the_role_that_its_masks_give_it() -> None:
    roles = token_roles(make_matched())

    prefix = ["prefix"] * 6 + ["prefix slot"] * 4 + ["prefix"]
    appended = ["appended"] * 3 + ["appended desc", "appended"] + ["appended slot"] * 4 + ["appended"] * 3
    assert roles == ["prompt"] * len(PROMPT) + prefix + appended
    assert len(roles) == len(PROMPT) + len(PREFIX) + len(APPENDED)


def test_the_text_is_the_sequence_with_a_target_behind_each_slot_and_each_role_in_its_style() -> None:
    text = sequence_text(make_matched(), token_text)
    pieces = [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]

    assert text.plain.startswith('<|im_start|><|image_pad|>×6list{"object_1descWBCbox<|coord_406|>→400')
    assert text.plain.endswith("<|coord_400|>→400}}<|im_end|>")
    assert styled(STYLES["prefix slot"], pieces) == (
        "<|coord_406|>→400<|coord_368|>→370<|coord_1767|>".replace("1767", "767") + "→760<|coord_784|>→780"
    )
    assert styled(STYLES["appended desc"], pieces) == "RBC"
    assert styled(STYLES["appended"], pieces) == ", objectdescbox}}<|im_end|>"
    assert styled(STYLES["prompt"], pieces) == "<|im_start|><|image_pad|>×6list"


def test_without_colours_marks_tell_the_roles_and_the_legend_explains_them() -> None:
    text = sequence_text(make_matched(), token_text, is_marked=True).plain
    view = shown(render_inspection(make_inspection(), token_text))

    assert '×6list▷{"object_1descWBCbox◇<|coord_406|>→400' in text
    assert "▶, objectdesc" in text.replace("_1", "")
    assert "▪RBC▶box◆<|coord_10|>" in text
    for line in ("▷ written by the model, not trained", "◆ appended coordinate → its bin"):
        assert line in view


def test_the_head_says_who_wrote_a_rollout_and_when_and_nothing_that_is_not_known() -> None:
    told = shown(
        render_inspection(make_inspection(segment=make_segment(generated_at_ms=86_400_000)), token_text)
    )
    unknown = make_segment(producer="", generation_ms=0, generated_at_ms=86_400_000)

    assert "producer-1, 840 ms, seed 0, written 1970-01-02 00:00 UTC" in told
    bare = shown(render_inspection(make_inspection(segment=unknown), token_text))
    assert "written 1970-01-02 00:00 UTC" in bare
    assert "0 ms" not in bare


def test_repeated_tokens_outside_the_prompt_are_never_folded() -> None:
    matched = make_matched()
    matched.token_ids[len(PROMPT) : len(PROMPT) + 6] = 4

    assert "object" * 6 in sequence_text(matched, token_text).plain


def test_a_segment_whose_append_is_the_closing_brace_alone_keeps_its_prefix() -> None:
    ids = [*PROMPT, *PREFIX, 9, 12]
    ce_mask = np.zeros(len(ids), bool)
    ce_mask[-2:] = True
    matched = make_matched(
        token_ids=np.asarray(ids, np.int32),
        ce_mask=ce_mask,
        desc_mask=np.zeros(len(ids), bool),
        slot_positions=np.zeros(0, np.int32),
        slot_targets=np.zeros(0, np.int16),
        slot_in_prefix=np.zeros(0, bool),
    )

    assert token_roles(matched) == ["prompt"] * len(PROMPT) + ["prefix"] * len(PREFIX) + ["appended"] * 2


def test_the_tables_say_of_each_object_why_it_counts_or_not() -> None:
    lines = shown(render_inspection(make_inspection(), token_text)).splitlines()

    def line_of(*words: str) -> str:
        return next(line for line in lines if all(word in line for word in words))

    assert "400 370 760 780" in line_of("WBC", "matched: 0 WBC", "406 368 767 784")
    assert line_of("Platelets", "bbox_invalid", "5 5 4 9")
    assert line_of("RBC", "valid, not matched")
    assert line_of("0", "WBC", "object 1")
    assert line_of("1", "RBC", "appended", "10 20 300 400")
    assert line_of("record", "r-17")
    assert line_of("tokens", "8 prompt, 13 written, 31 in the training sequence")


def test_a_rollout_without_a_training_segment_shows_what_was_written_and_why() -> None:
    inspection = make_inspection(matched=None, is_invalid=True, verdict="dropped: stale_on_claim")

    text = shown(render_inspection(inspection, token_text))

    assert "dropped: stale_on_claim" in text
    assert "rollout as written" in text
    assert "not a valid rollout" in text
    assert "<|coord_406|><|coord_368|>" in text
    assert "nothing" in text
    assert "appended" not in text


def test_an_empty_rollout_with_no_ground_truth_is_shown() -> None:
    inspection = make_inspection(segment=make_segment(assistant_payload=()), objects=())

    assert shown(render_inspection(inspection, token_text)).count("none") == 2


def test_what_the_model_wrote_cannot_command_the_terminal() -> None:
    evil = "\x1b]0;owned\x07[red]"
    objects = (InspectedObject(number=1, desc=evil, reason="malformed_json"),)
    inspection = make_inspection(objects=objects)

    for matched in (inspection.matched, None):
        changed = make_inspection(objects=objects, matched=matched, verdict=evil)
        text = shown(render_inspection(changed, lambda token_id: evil))
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "[red]" in text


def test_the_image_shows_ground_truth_and_what_can_be_drawn_of_the_objects() -> None:
    image = Image.new("RGB", (640, 480), (80, 80, 80))
    objects = (*make_inspection().objects, InspectedObject(number=9, bins=(3,), reason="wrong_arity"))

    drawn = np.asarray(draw_inspection(make_inspection(objects=objects), image), dtype=int)

    assert drawn.shape == (480, 640, 3)
    for colour in (GROUND_TRUTH_COLOUR, PREDICTION_COLOUR):
        assert (np.abs(drawn - np.asarray(colour)).sum(axis=2) < 40).sum() > 500


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_view_stays_within_the_terminal(width: int) -> None:
    text = shown(render_inspection(make_inspection(), token_text), width)

    assert max(len(line) for line in text.splitlines()) <= width


@pytest.mark.req("L-7")
def test_a_rollout_of_an_adapter_says_which_and_on_which_base(tmp_path: Path) -> None:
    plan = AdapterPlan(
        rank=2,
        alpha=4.0,
        layers=("q_proj",),
        coordinate_ids=(),
        base=BaseModel(path="/models/base", fingerprint="0123456789abcdef"),
    )
    model = str(SHIPPED_MODEL)
    whole = load_mapping(tmp_path, make_mapping(model__name_or_path=model))
    adapted = load_mapping(tmp_path, make_mapping(model__name_or_path=model, training__lora={"rank": 2}))
    folder = RunFolder(tmp_path / "runs" / "one")
    folder.policy_version_dir(3).mkdir(parents=True)
    write_adapter(folder.policy_version_dir(3), plan, {"q_proj.lora_A.default.weight": torch.zeros(2, 2)})

    assert base_of(folder, whole, 3) == ""
    assert base_of(folder, adapted, 3) == "/models/base (0123456789abcdef)"
    assert base_of(folder, adapted, 2) == model
    assert "v3, an adapter on /models/base (0123" in shown(
        render_inspection(
            make_inspection(base=base_of(folder, adapted, 3), segment=make_segment(policy_version=3)),
            token_text,
        ),
        width=160,
    )
