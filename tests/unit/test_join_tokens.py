"""Tokens where a kept rollout meets what is appended: the model's own, for every tokenizer (section 7)."""

from __future__ import annotations

import random
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from broker_schemas.method.payload import render_payload
from broker_schemas.records.records import GroundTruthObject, MatchedSegment
from consumers.joins import examine_join
from consumers.parsing import parse_rollout
from consumers.record_matching import MatcherTools, match_record
from consumers.token_bytes import token_bytes_of
from tests.builders.qwen_tokenizer import qwen_tokenizer
from tests.builders.rollouts import make_rollout
from tests.builders.settings import method_settings
from tests.builders.tokenizers import (
    DESCRIPTIONS,
    byte_fallback_tokenizer,
    coord_vocabulary,
    encode,
    fusing_tokenizer,
    make_box,
    make_polygon,
    plain_tokenizer,
)


@cache
def shipped_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(files("rollstream") / "assets" / "scenes_tiny" / "tokenizer.json"))


TOKENIZERS = [shipped_tokenizer, plain_tokenizer, fusing_tokenizer, byte_fallback_tokenizer, qwen_tokenizer]


@cache
def tools_of(make_tokenizer: Any) -> MatcherTools:
    tokenizer = make_tokenizer()
    end = tokenizer.token_to_id("<|im_end|>")
    return MatcherTools(
        tokenizer=tokenizer,
        coord_vocab=coord_vocabulary(tokenizer),
        end_token_id=0 if end is None else end,
        capacity=1 << 16,
        **method_settings(),
    )


def apart(seed: int, num_objects: int) -> list[GroundTruthObject]:
    """Boxes and polygons that no other overlaps, in the order in which a rollout names them."""
    rng = random.Random(seed)
    objects = []
    for cell in range(num_objects):
        x, y, desc = 240 * (cell % 4), 240 * (cell // 4), rng.choice(DESCRIPTIONS)
        if rng.random() < 0.5:
            objects.append(make_box(desc, (x, y, x + rng.randint(20, 90), y + rng.randint(20, 90))))
        else:
            objects.append(make_polygon(desc, (x + 40, y, x + 90, y + 80, x, y + rng.randint(60, 90))))
    return objects


def segment_of(
    make_tokenizer: Any, truth: list[GroundTruthObject], response_ids: list[int]
) -> MatchedSegment:
    record = make_rollout(
        truth, tokenizer=make_tokenizer(), response_token_ids=np.asarray(response_ids, np.int32)
    )
    segment = match_record(record, tools_of(make_tokenizer)).segment
    assert segment is not None
    return segment


def answer_ids(segment: MatchedSegment) -> list[int]:
    return segment.token_ids[segment.prompt_length : -1].tolist()


@pytest.mark.req("M-6", "M-7")
@pytest.mark.parametrize("make_tokenizer", TOKENIZERS)
@pytest.mark.parametrize("num_objects", [0, 1, 2, 5, 9])
def test_a_rollout_with_nothing_to_append_keeps_its_own_tokens(make_tokenizer: Any, num_objects: int) -> None:
    for seed in range(6):
        truth = apart(seed, num_objects)
        own = encode(make_tokenizer(), render_payload(truth).text)
        segment = segment_of(make_tokenizer, truth, own)
        assert answer_ids(segment) == own
        assert segment.ce_mask[-1]
        # One token decides that the answer ends here, and it is trained; all before it is the model's.
        assert int(segment.ce_mask[segment.prompt_length : -1].sum()) == 1
        assert segment.ce_mask[-2]


@pytest.mark.req("M-6", "M-7")
@pytest.mark.parametrize("make_tokenizer", TOKENIZERS)
def test_a_rollout_cut_anywhere_and_made_whole_has_the_tokens_of_the_ground_truth(
    make_tokenizer: Any,
) -> None:
    rng = random.Random(5)
    for seed in range(6):
        truth = apart(seed, 5)
        whole = encode(make_tokenizer(), render_payload(truth).text)
        for num_kept in range(6):
            said = encode(make_tokenizer(), render_payload(truth[:num_kept]).text)
            assert answer_ids(segment_of(make_tokenizer, truth, said)) == whole
        for _ in range(8):
            cut = whole[: rng.randrange(len(whole) + 1)]
            assert answer_ids(segment_of(make_tokenizer, truth, cut)) == whole


@pytest.mark.req("M-6", "M-8")
@pytest.mark.parametrize("make_tokenizer", TOKENIZERS)
def test_exactly_the_tokens_that_hold_an_appended_byte_are_appended(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    table = token_bytes_of(tokenizer)
    for seed in range(6):
        truth = apart(seed, 6)
        for num_kept in (0, 1, 3, 6):
            said = encode(tokenizer, render_payload(truth[:num_kept]).text)
            kept_bytes = len(parse_rollout(said, tokenizer, coord_vocabulary(tokenizer)).prefix_text.encode())
            segment = segment_of(make_tokenizer, truth, said)
            answer = np.asarray(answer_ids(segment))
            _, ends = table.join(answer)
            slots = segment.slot_positions - segment.prompt_length
            supervised = segment.ce_mask[segment.prompt_length : -1].copy()
            supervised |= segment.desc_mask[segment.prompt_length : -1]
            supervised[slots[~segment.slot_in_prefix]] = True
            assert supervised.tolist() == (ends > kept_bytes).tolist()


@pytest.mark.req("M-6", "M-8")
@pytest.mark.parametrize(
    "num_kept, masked, trained",
    [
        (0, [], ['{"', "object"]),
        (1, ['"]'], ["},", ' "', "object"]),
        (2, ['"]'], ["]},", ' "', "object"]),
        (3, ['"]'], ["}}", "<|im_end|>"]),
    ],
)
def test_a_real_qwen_vocabulary_is_trained_where_it_decides_to_go_on_or_to_end(
    num_kept: int, masked: list[str], trained: list[str]
) -> None:
    truth = [
        make_box("cat", (1, 1, 40, 40)),
        make_polygon("leaf", (300, 300, 400, 300, 400, 420)),
        make_box("cat", (600, 600, 700, 700)),
    ]
    said = encode(qwen_tokenizer(), render_payload(truth[:num_kept]).text)
    segment = segment_of(qwen_tokenizer, truth, said)
    pieces = token_bytes_of(qwen_tokenizer()).pieces
    first = int(np.flatnonzero(segment.ce_mask)[0])
    texts = [pieces[token_id].decode() for token_id in segment.token_ids.tolist()]
    assert texts[first : first + len(trained)] == trained
    assert segment.ce_mask[first : first + len(trained)].all()
    assert texts[first - len(masked) : first] == masked


@pytest.mark.req("M-7")
def test_a_token_with_content_that_reaches_past_the_kept_text_is_cut_by_its_bytes() -> None:
    tokenizer = fusing_tokenizer()
    text = '{"object_1": {"bbox_2d": ["<|coord_1|>", "<|coord_2|>", "<|coord_3|>", "<|coord_4|>"], "desc": "x'
    piece = next(i for i, data in enumerate(token_bytes_of(tokenizer).pieces) if data == b'"}}<|im_end|>')
    ids = [*encode(tokenizer, text), piece]
    parsed = parse_rollout(ids, tokenizer, coord_vocabulary(tokenizer))
    assert [item.desc for item in parsed.objects] == ["x"]
    assert list(parsed.prefix_ids) == ids[:-1]
    assert parsed.open_tail == '"}'


@pytest.mark.req("M-7")
@pytest.mark.parametrize("make_tokenizer", TOKENIZERS)
def test_the_look_at_a_tokenizer_finds_the_same_tokens_at_every_join(make_tokenizer: Any) -> None:
    report = examine_join(make_tokenizer(), coord_vocabulary(make_tokenizer()))
    assert report.is_exact
    assert report.going_on != report.ending


def test_the_look_at_a_qwen_tokenizer_names_the_tokens_of_the_decision() -> None:
    report = examine_join(qwen_tokenizer(), coord_vocabulary(qwen_tokenizer()))
    assert report.describe() == 'after a box goes on with `"]` `},` and ends with `"]` `}}`'
