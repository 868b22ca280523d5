"""From record to outcome: segments, rejections with their reason, and what is kept of parse failures."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from broker_schemas.errors import DataError
from broker_schemas.records.records import GroundTruthObject
from consumers.record_matching import MatcherTools, match_record, match_rollout
from tests.builders.rollouts import make_rollout, make_tools
from tests.builders.settings import method_settings
from tests.builders.tokenizers import (
    coord_vocabulary,
    make_box,
    make_polygon,
    plain_tokenizer,
    random_objects,
)


@pytest.mark.req("M-6")
def test_a_good_rollout_becomes_a_segment_and_nothing_else() -> None:
    outcome = match_record(make_rollout(), make_tools())
    assert outcome.segment is not None
    assert (outcome.rejection, outcome.evaluation, outcome.parse_failure) == (None, None, None)
    assert outcome.counters == outcome.segment.counters
    assert outcome.segment.record_id == "r-1"
    assert outcome.segment.policy_version == 3


@pytest.mark.req("M-11")
@pytest.mark.parametrize(
    "reason, changes",
    [
        ("token_id_out_of_vocab", {"response_token_ids": np.array([10**6], np.int32)}),
        ("token_id_out_of_vocab", {"prompt_token_ids": np.array([1, 10**6], np.int32)}),
        ("token_id_out_of_vocab", {"prompt_token_ids": np.array([-1], np.int32)}),
        ("record_malformed", {"prompt_token_ids": np.array([], np.int32)}),
        ("record_malformed", {"response_logprobs": np.zeros(1, np.float32)}),
        ("ground_truth_malformed", {"assistant_payload": (make_box(bins=(1, 2, 3)),)}),
        ("ground_truth_malformed", {"assistant_payload": (make_box(bins=(1, 2, 3, 1000)),)}),
        ("ground_truth_malformed", {"assistant_payload": (make_polygon(bins=(1, 2, 3, 4)),)}),
        ("ground_truth_malformed", {"assistant_payload": (make_box(desc=""),)}),
        ("ground_truth_malformed", {"assistant_payload": (make_box(desc=" "),)}),
        ("ground_truth_malformed", {"assistant_payload": (make_box(desc="two\nlines"),)}),
        ("ground_truth_malformed", {"assistant_payload": (make_box(desc="\ud800"),)}),
        ("image_missing", {"purpose": "evaluation", "images": ()}),
    ],
)
def test_impossible_content_is_rejected_with_its_reason(reason: str, changes: dict[str, Any]) -> None:
    outcome = match_record(dataclasses.replace(make_rollout(), **changes), make_tools())
    assert outcome.rejection is not None
    assert outcome.rejection.reason == reason
    assert outcome.rejection.detail.startswith("segment r-1")
    assert outcome.segment is None


@pytest.mark.req("M-11")
def test_log_probabilities_that_are_not_finite_are_rejected() -> None:
    num_tokens = len(make_rollout().response_token_ids)
    record = make_rollout(response_logprobs=np.full(num_tokens, np.nan, np.float32))
    rejection = match_record(record, make_tools()).rejection
    assert rejection is not None
    assert rejection.reason == "logprobs_not_finite"


@pytest.mark.req("P-4")
def test_a_segment_over_the_capacity_is_rejected_with_advice_and_one_at_it_passes() -> None:
    record = make_rollout(random_objects(0, 5))
    segment = match_record(record, make_tools()).segment
    assert segment is not None
    assert match_record(record, make_tools(segment.encoded_length)).segment is not None
    rejection = match_record(record, make_tools(segment.encoded_length - 1)).rejection
    assert rejection is not None
    assert rejection.reason == "segment_too_long"
    assert f"got {segment.encoded_length} tokens" in rejection.detail
    assert "training.global_max_length" in rejection.detail


@pytest.mark.req("M-11")
@pytest.mark.parametrize(
    "truth, response",
    [
        ([make_box()], '{"object_1": {"desc": "<|image_pad|>"}}'),
        ([make_box("<|image_pad|>")], "{}"),
    ],
)
def test_an_image_token_in_the_answer_is_rejected(truth: list[GroundTruthObject], response: str) -> None:
    rejection = match_record(make_rollout(truth, response=response), make_tools()).rejection
    assert rejection is not None
    assert rejection.reason == "image_token_in_answer"


@pytest.mark.req("M-12")
@pytest.mark.parametrize(
    "response, reasons",
    [
        ("prose", ("invalid_rollout",)),
        ('{"object_1": {"desc": "a"}, "object_2": {', ("missing_geom", "truncated")),
    ],
)
def test_a_parse_failure_is_kept_with_text_image_and_reasons(response: str, reasons: tuple[str, ...]) -> None:
    failure = match_record(make_rollout(response=response), make_tools()).parse_failure
    assert failure is not None
    assert (failure.text, failure.reasons, failure.image_paths) == (response, reasons, ("images/1.png",))


@pytest.mark.req("M-9")
def test_the_stages_of_a_rollout_line_up() -> None:
    rollout = match_rollout(make_rollout([make_box(), make_polygon()]), make_tools())
    assert rollout.match.pairs == ((0, 0), (1, 1))
    assert rollout.targets[0] == list(make_box().bins)
    assert rollout.targets[1] is not None
    assert len(rollout.targets[1]) == 6


@pytest.mark.req("M-11")
def test_tools_refuse_a_tokenizer_that_cannot_serve() -> None:
    bare = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    with pytest.raises(DataError, match="no token <|im_end|>"):
        MatcherTools.for_tokenizer(bare, capacity=10, **method_settings())
    vocabulary = coord_vocabulary(plain_tokenizer())
    with pytest.raises(DataError, match="no ordinary tokens write"):
        MatcherTools(tokenizer=bare, coord_vocab=vocabulary, end_token_id=0, capacity=10, **method_settings())
    wrong: list[dict[str, Any]] = [{"end_token_id": 10**6}, {"capacity": 0}, {"num_token_ids": 10}]
    for changes in wrong:
        with pytest.raises(DataError, match="expected"):
            dataclasses.replace(make_tools(), **changes)


@pytest.mark.req("M-11")
def test_ids_between_the_tokenizer_and_the_width_of_the_model_are_possible_and_write_nothing() -> None:
    tools = dataclasses.replace(make_tools(), num_token_ids=make_tools().width + 64)
    record = make_rollout()
    padded = np.append(record.response_token_ids, np.int32(make_tools().width + 3))
    outcome = match_record(dataclasses.replace(record, response_token_ids=padded), tools)
    assert outcome.segment is not None
    assert outcome.segment.token_ids.max() < make_tools().width
