"""Evaluation results: counts, scores, and the way through bytes and back."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import msgpack
import numpy as np
import pytest

from broker_schemas.errors import MalformedRecord
from broker_schemas.method.payload import render_payload
from consumers.evaluation_result import EvaluationResult
from consumers.record_matching import match_record
from tests.builders.rollouts import IMAGE, make_rollout, make_tools
from tests.builders.tokenizers import coord_vocabulary, make_box, make_polygon, plain_tokenizer

TRUTH = [make_box("far", (1, 1, 40, 40)), make_box("near"), make_polygon()]
SAID = [make_box("near"), make_box("wrong", (900, 900, 990, 990))]


def evaluated(said: list[Any] | None = None, **changes: Any) -> EvaluationResult:
    response = render_payload(said or SAID).text + "<|im_end|>"
    outcome = match_record(
        make_rollout(TRUTH, response=response, purpose="evaluation", **changes), make_tools(1)
    )
    assert outcome.segment is None
    assert outcome.evaluation is not None
    return outcome.evaluation


@pytest.mark.req("P-12", "M-12")
def test_an_evaluation_record_gives_counts_and_is_never_turned_into_a_segment() -> None:
    result = evaluated()
    assert (len(result.predictions), len(result.ground_truth), result.num_matched) == (2, 3, 1)
    assert [item.shape for item in result.predictions] == SAID
    assert result.ground_truth == tuple(TRUTH)
    assert result.image == IMAGE
    assert not result.truncated
    assert result.rollout_text == render_payload(SAID).text + "<|im_end|>"


@pytest.mark.req("M-12")
def test_without_log_probabilities_there_is_no_score() -> None:
    assert [item.logprob_score for item in evaluated().predictions] == [None, None]


@pytest.mark.req("U-5")
def test_the_counts_of_a_result_tell_classes_and_repeats_apart() -> None:
    said = [make_box("far"), make_box("far"), make_box("near", (1, 1, 40, 41))]
    result = evaluated(said)
    assert (result.num_matched, result.overlaps.labels_right, result.overlaps.matched_class) == (2, 0, 0)
    assert result.overlaps.duplicates == 1
    assert result.overlaps.any_class == (2,) * 10
    assert result.overlaps.right_class == (0,) * 10


@pytest.mark.parametrize(
    "changes",
    [
        {"response_token_ids": np.asarray([7, 1 << 20], np.int32)},
        {"response_logprobs": "nan"},
        {"response_token_ids": np.zeros(20_000, np.int32), "finish_reason": "length"},
    ],
    ids=["ids of a padded vocabulary", "log-probabilities that are no numbers", "far too long"],
)
def test_an_answer_that_cannot_be_used_is_an_invalid_one_and_stops_nothing(changes: dict[str, Any]) -> None:
    if changes.get("response_logprobs") == "nan":
        num_tokens = len(make_rollout(TRUTH, response=render_payload(SAID).text).response_token_ids) + 1
        changes = {"response_logprobs": np.full(num_tokens, np.nan, np.float32)}
    result = evaluated(**changes)
    assert result.is_invalid_rollout
    assert (result.predictions, result.num_matched) == ((), 0)
    assert result.ground_truth == tuple(TRUTH)
    assert result.truncated == ("finish_reason" in changes)
    assert EvaluationResult.from_body(msgpack.unpackb(msgpack.packb(result.to_body()))) == result


@pytest.mark.req("M-12")
def test_the_score_is_the_mean_log_probability_of_the_objects_own_coordinates() -> None:
    ids = make_rollout(TRUTH, response=render_payload(SAID).text + "<|im_end|>").response_token_ids.tolist()
    by_id = coord_vocabulary(plain_tokenizer()).bin_by_id
    coordinates = [i for i, token_id in enumerate(ids) if token_id in by_id]
    logprobs = np.full(len(ids), -50.0, np.float32)
    logprobs[coordinates] = [-0.5, -1.0, -1.5, -2.0, -0.25, -0.25, -0.25, -0.25]
    scores = [item.logprob_score for item in evaluated(response_logprobs=logprobs).predictions]
    assert scores == pytest.approx([math.exp(-1.25), math.exp(-0.25)])


def test_a_result_survives_msgpack_and_json() -> None:
    result = dataclasses.replace(evaluated(), truncated=True, dropped={"wrong_arity": 2})
    body = result.to_body()
    assert EvaluationResult.from_body(msgpack.unpackb(msgpack.packb(body))) == result
    assert EvaluationResult.from_body(json.loads(json.dumps(body))) == result


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_matched", 4),
        ("truncated", 2),
        ("image", 5),
        ("predictions", [{"desc": "a", "bbox_2d": [1, 2, 3, 4], "logprob_score": 2}]),
        ("predictions", [{"desc": "a", "bbox_2d": [1, 2, 3, 4], "logprob_score": "x"}]),
        ("overlaps", {}),
        (
            "overlaps",
            {"matched_class": 0, "labels_right": 0, "duplicates": 0, "any_class": [], "right_class": []},
        ),
        ("ground_truth", [{"desc": "a"}]),
    ],
)
def test_a_body_that_contradicts_itself_is_refused(field: str, value: Any) -> None:
    with pytest.raises(MalformedRecord):
        EvaluationResult.from_body({**evaluated().to_body(), field: value})
