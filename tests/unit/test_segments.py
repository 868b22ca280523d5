"""Training segments: what is appended, what each token learns, and the bytes on the wire."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers

from broker_schemas.method.payload import render_entries, render_payload
from broker_schemas.records.records import (
    GroundTruthObject,
    MatchedSegment,
    SegmentRecord,
    wire_bytes_per_token,
)
from consumers.fragments import FragmentNotEncoded, encode_fragment
from consumers.matching import match_objects
from consumers.parsing import parse_rollout
from consumers.record_matching import MatcherTools, match_record
from consumers.segments import SegmentVocabulary, build_segment
from consumers.token_bytes import token_bytes_of
from rollstream.show.inspecting import rollout_of
from tests.builders.rollouts import make_rollout, make_tools
from tests.builders.settings import match_settings
from tests.builders.tokenizers import (
    coord_vocabulary,
    encode,
    fusing_tokenizer,
    make_box,
    make_polygon,
    plain_tokenizer,
    random_objects,
)

FAR = make_box("far", (1, 1, 40, 40))
NEAR = make_box("near", (406, 368, 767, 784))
POLYGON = make_polygon("leaf", (600, 100, 700, 100, 700, 250))


def built(record: SegmentRecord, tools: MatcherTools | None = None) -> MatchedSegment:
    segment = match_record(record, tools or make_tools()).segment
    assert segment is not None
    return segment


def answer_text(segment: MatchedSegment) -> str:
    return token_bytes_of(plain_tokenizer()).text(segment.token_ids[segment.prompt_length :])


def texts_where(segment: MatchedSegment, mask: Any) -> list[str]:
    table = token_bytes_of(plain_tokenizer())
    return [table.pieces[i].decode(errors="replace") for i in segment.token_ids[mask].tolist()]


@pytest.mark.req("M-6", "M-8")
def test_a_matched_and_a_missing_object_give_the_masks_of_the_method() -> None:
    response = render_payload([make_box("near", (400, 370, 770, 780))]).text + "<|im_end|>"
    segment = built(make_rollout([FAR, NEAR], response=response))
    appended = render_entries([FAR], first_number=2, opening=", ").text
    assert answer_text(segment) == response[: -len("}<|im_end|>")] + appended + "<|im_end|>"
    assert segment.slot_targets.tolist() == [406, 368, 767, 784, 1, 1, 40, 40]
    assert segment.slot_in_prefix.tolist() == [True] * 4 + [False] * 4
    assert texts_where(segment, segment.slot_positions[:4]) == [
        f"<|coord_{k}|>" for k in (400, 370, 770, 780)
    ]
    assert texts_where(segment, segment.slot_positions[4:]) == [f"<|coord_{k}|>" for k in (1, 1, 40, 40)]
    assert "".join(texts_where(segment, segment.desc_mask)) == "far"
    supervised = "".join(texts_where(segment, segment.ce_mask))
    # This tokenizer fuses the closing of a box with the comma after it: the token is appended.
    assert supervised == '"]}, "object_2": {"desc": "", "bbox_2d": ["", "", "", ""]}}<|im_end|>'
    num_joined = len(encode(plain_tokenizer(), '"]}' + appended))
    assert not segment.ce_mask[: len(segment.token_ids) - num_joined - 1].any()


@pytest.mark.req("M-6")
@pytest.mark.parametrize(
    "response, appended",
    [
        ("{}<|im_end|>", '{"object_1": '),
        ("no json", '{"object_1": '),
        ('{"object_3": {"desc": "x"}}', '{"object_3": {"desc": "x"}, "object_4": '),
        ('{"object_1": {"desc": "cut', '{"object_1": '),
    ],
)
def test_a_comma_leads_only_where_the_prefix_holds_an_entry(response: str, appended: str) -> None:
    text = answer_text(built(make_rollout([FAR], response=response)))
    assert text.startswith(appended + '{"desc": "far"')
    json.loads(text.removesuffix("<|im_end|>"))


@pytest.mark.req("M-6")
@pytest.mark.parametrize("truth, closing", [([], "}"), ([NEAR], '"]}}'), ([NEAR, POLYGON], '"]]}}')])
def test_nothing_missing_only_closes_the_answer(truth: list[GroundTruthObject], closing: str) -> None:
    segment = built(make_rollout(truth))
    assert answer_text(segment) == render_payload(truth).text + "<|im_end|>"
    assert texts_where(segment, segment.ce_mask) == [closing, "<|im_end|>"]
    assert segment.counters["unmatched_appended"] == 0


@pytest.mark.req("M-8")
def test_an_unmatched_prediction_and_its_coordinates_are_not_supervised() -> None:
    response = render_payload([make_box("wrong", (900, 900, 990, 990))]).text
    segment = built(make_rollout([FAR], response=response))
    assert not segment.slot_in_prefix.any()
    assert segment.slot_targets.tolist() == [1, 1, 40, 40]


@pytest.mark.req("M-8")
def test_a_coordinate_token_in_an_appended_description_is_text_without_any_loss() -> None:
    tricky = make_box('<|coord_5|> "猫" <|im_end|>', (1, 2, 30, 40))
    segment = built(make_rollout([tricky], response="{}"))
    assert segment.slot_targets.tolist() == [1, 2, 30, 40]
    assert "".join(texts_where(segment, segment.desc_mask)).startswith("<|coord_5|>")
    assert "<|coord_5|>" not in texts_where(segment, segment.ce_mask)
    assert not (segment.ce_mask & segment.desc_mask).any()


@pytest.mark.req("M-8")
def test_a_token_that_overlaps_a_description_in_part_is_masked_whole() -> None:
    tokenizer = fusing_tokenizer()
    parsed = parse_rollout(encode(tokenizer, "{}"), tokenizer, coord_vocabulary(tokenizer))
    table = token_bytes_of(tokenizer)
    for desc in ("leaf", "café crème", "猫と犬", "x"):
        others = [make_box("犬é"), make_box(desc)]
        fragment = encode_fragment(parsed, others, tokenizer, coord_vocabulary(tokenizer))
        _, ends = table.join(fragment.ids)
        touched: set[int] = set()
        for text in ("犬é", desc):
            start = len(fragment.text[: fragment.text.index(f'"{text}"') + 1].encode())
            touched |= {
                int(np.searchsorted(ends, start + k, side="right")) for k in range(len(text.encode()))
            }
        assert set(np.flatnonzero(fragment.desc_mask).tolist()) == touched


@pytest.mark.req("M-5", "M-6", "M-12")
def test_a_pair_without_a_target_is_excluded_counted_and_its_ground_truth_appended() -> None:
    record = make_rollout([FAR, NEAR, POLYGON])
    tokenizer = plain_tokenizer()
    vocabulary = coord_vocabulary(tokenizer)
    parsed = parse_rollout(record.response_token_ids, tokenizer, vocabulary)
    match = match_objects(parsed.objects, record.assistant_payload, match_settings())
    words = SegmentVocabulary(tokenizer=tokenizer, coord_vocab=vocabulary, end_token_id=5)
    segment = build_segment(record, parsed, match, [list(FAR.bins), None, list(POLYGON.bins)], words)
    assert segment.slot_targets.tolist() == [*FAR.bins, *POLYGON.bins, *NEAR.bins]
    assert segment.counters["targets_excluded"] == 1
    assert segment.counters["matched"] == 2
    assert segment.counters["unmatched_appended"] == 1
    assert segment.token_ids[-1] == 5


@pytest.mark.req("M-12")
def test_the_counters_say_what_became_of_a_rollout() -> None:
    response = (
        '{"object_1": {"desc": "a"}, '
        + render_payload([NEAR, make_box("wrong", (900, 900, 990, 990))])
        .text[1:]
        .replace("object_1", "object_5")
    )[:-9]
    counters = built(make_rollout([FAR, NEAR], response=response)).counters
    assert counters == {
        "rollouts": 1,
        "valid_objects": 1,
        "ground_truth_objects": 2,
        "matched": 1,
        "unmatched_appended": 1,
        "duplicates": 0,
        "gating_rejections": 1,
        "targets_excluded": 0,
        "truncated": 1,
        "invalid_rollouts": 0,
        "dropped_missing_geom": 1,
        "prefix_slots": 4,
        "appended_slots": 4,
    }


@pytest.mark.req("M-6", "M-8", "Q-3")
def test_random_rollouts_close_decode_again_and_stay_under_ten_bytes_a_token() -> None:
    tools = make_tools()
    for seed in range(60):
        rng = random.Random(seed)
        truth = random_objects(seed, 14)
        said = [item for item in truth if rng.random() < 0.7]
        text = render_payload(said).text + "<|im_end|>"
        record = make_rollout(
            truth, response=text if rng.random() < 0.7 else text[: rng.randrange(len(text))]
        )
        segment = built(record, tools)
        check_segment(segment, record)
        raw = segment.encode_body()
        again = MatchedSegment.decode_body(raw)
        assert again.encode_body() == raw
        for name in ("token_ids", "ce_mask", "desc_mask", "slot_positions", "slot_targets", "slot_in_prefix"):
            assert np.array_equal(getattr(again, name), getattr(segment, name))
        assert wire_bytes_per_token(raw, segment.encoded_length) <= 10


def check_segment(segment: MatchedSegment, record: SegmentRecord) -> None:
    """What the table of section 7 says, token by token."""
    segment.check("test")
    text = answer_text(segment).removesuffix("<|im_end|>")
    assert len(json.loads(text)) >= segment.counters["ground_truth_objects"]
    by_id = coord_vocabulary(plain_tokenizer()).bin_by_id
    is_coordinate = np.array([token_id in by_id for token_id in segment.token_ids.tolist()])
    assert is_coordinate[segment.slot_positions].all()
    assert not (is_coordinate & segment.ce_mask).any()
    appended = segment.slot_positions[~segment.slot_in_prefix]
    assert [by_id[i] for i in segment.token_ids[appended].tolist()] == segment.slot_targets[
        ~segment.slot_in_prefix
    ].tolist()
    assert segment.token_ids[: segment.prompt_length].tolist() == record.prompt_token_ids.tolist()
    assert segment.ce_mask[-1]
    # From the first appended token on, each one is structure, description or coordinate.
    first = int(np.flatnonzero(segment.ce_mask)[0])
    assert (segment.ce_mask | segment.desc_mask | is_coordinate)[first:].all()


@pytest.mark.req("Q-3")
@pytest.mark.parametrize("num_objects", [5, 14, 30])
def test_a_rollout_record_with_log_probabilities_stays_under_ten_bytes_a_token(num_objects: int) -> None:
    record = make_rollout(random_objects(1, num_objects))
    num_response = len(record.response_token_ids)
    record = make_rollout(record.assistant_payload, response_logprobs=np.full(num_response, -0.5, np.float32))
    num_tokens = num_response + len(record.prompt_token_ids)
    assert wire_bytes_per_token(record.encode_body(), num_tokens) <= 10


@pytest.mark.req("M-6")
def test_a_tokenizer_that_normalises_text_gets_descriptions_in_its_own_form() -> None:
    tokenizer = Tokenizer.from_str(plain_tokenizer().to_str())
    tokenizer.normalizer = normalizers.NFC()
    vocabulary = coord_vocabulary(plain_tokenizer())
    parsed = parse_rollout(encode(tokenizer, "{}"), tokenizer, vocabulary)
    fragment = encode_fragment(parsed, [make_box("cafe\u0301")], tokenizer, vocabulary)
    assert '"desc": "caf\u00e9"' in fragment.text
    assert fragment.slot_bins.tolist() == list(make_box().bins)


@pytest.mark.req("M-11")
def test_a_tokenizer_that_cannot_write_the_fragment_is_refused() -> None:
    tokenizer = Tokenizer.from_str(plain_tokenizer().to_str())
    tokenizer.enable_truncation(8)
    vocabulary = coord_vocabulary(plain_tokenizer())
    parsed = parse_rollout([], tokenizer, vocabulary)
    with pytest.raises(FragmentNotEncoded, match="does not give back"):
        encode_fragment(parsed, [make_box()], tokenizer, vocabulary)


def test_a_segment_keeps_who_wrote_its_rollout_and_one_without_a_name_keeps_its_bytes() -> None:
    named = built(make_rollout(producer="run-producer-0", generation_ms=840, seed=3))
    nameless = built(make_rollout())

    again = MatchedSegment.decode_body(named.encode_body())

    assert (again.producer, again.generated_at_ms) == ("run-producer-0", 7)
    assert rollout_of(again).producer == "run-producer-0"
    assert b"producer" not in nameless.encode_body(), "older programs wrote the same bytes"
    assert MatchedSegment.decode_body(nameless.encode_body()).producer == ""
