"""Bodies and replies of both endpoints: what is said, and which replies are not believed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from broker_schemas.errors import PromptMismatch, ServerFailed, ServerRefused
from broker_schemas.rollout_servers.weight_label import WeightLabel, parse_label
from producers.rollout_backend import Generation
from producers.vllm_requests import PromptRequest, build_body, read_generation
from tests.builders.settings import decoding_settings
from tests.builders.vllm_fakes import END_ID, chat_reply, tokens_reply

PROMPT = [602, 607, 607, 397]
DECODING = decoding_settings(max_new_tokens=3, temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.1)
REQUEST = PromptRequest(
    prompt_token_ids=np.asarray(PROMPT, np.int32),
    unexpanded_ids=(602, 607, 397),
    messages=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "List."}]}],
    image_urls=("data:image/png;base64,AAAA",),
    grids_thw=((1, 2, 4),),
    seed=17,
    end_token_id=END_ID,
)
HELD = WeightLabel(policy_version=4, weights_path="/p/v4")


def read(reply: dict[str, Any], weights: WeightLabel | None = None) -> Generation:
    return read_generation(reply, REQUEST, DECODING, where="POST one", weights=weights)


@pytest.mark.req("V-3")
def test_every_sampling_parameter_is_said_to_the_token_endpoint() -> None:
    body = build_body(REQUEST, "policy", DECODING, "tokens")

    assert body["token_ids"] == [602, 607, 397]
    assert body["content_parts"] == [{"type": "image_url", "url": "data:image/png;base64,AAAA"}]
    assert body["sampling_params"] == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.0,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": 3,
        "seed": 17,
        "n": 1,
        "stop_token_ids": [END_ID],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 0,
        "detokenize": False,
    }


@pytest.mark.req("V-3")
def test_the_chat_endpoint_gets_the_image_in_its_place_and_the_same_sampling() -> None:
    body = build_body(REQUEST, "policy", DECODING, "chat")

    image, text = body["messages"][0]["content"]
    assert image == {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert text == {"type": "text", "text": "List."}
    assert (body["seed"], body["top_k"], body["stop_token_ids"]) == (17, 20, [END_ID])
    assert body["return_token_ids"] is True


def test_top_k_off_is_said_as_zero() -> None:
    body = build_body(REQUEST, "policy", replace(DECODING, top_k=-1), "tokens")

    assert body["sampling_params"]["top_k"] == 0


def test_a_prompt_without_image_has_no_content_parts() -> None:
    body = build_body(replace(REQUEST, image_urls=()), "policy", DECODING, "tokens")

    assert "content_parts" not in body


@pytest.mark.req("V-5")
def test_a_reply_becomes_a_generation() -> None:
    generation = read(tokens_reply(PROMPT, [9, END_ID], "4:/p/v4"))

    assert generation.response_token_ids.tolist() == [9, END_ID]
    assert generation.response_token_ids.dtype == np.int32
    np.testing.assert_allclose(generation.response_logprobs, [-0.5, -1.5])
    assert generation.finish_reason == "stop"
    assert (generation.policy_version, generation.version_spans) == (4, ())
    assert generation.grids_thw == ((1, 2, 4),)


def test_a_reply_at_the_limit_is_cut() -> None:
    assert read(tokens_reply(PROMPT, [9, 9, 9])).finish_reason == "length"


@pytest.mark.req("V-2")
def test_a_rollout_over_a_weight_change_carries_its_lowest_version_and_the_spans() -> None:
    spans = [
        {"version": "4:/p/v4", "start": 0, "end": 1},
        {"version": "5:/p/v5", "start": 1, "end": 2},
        {"version": "5:/p/v5", "start": 2, "end": 3},
    ]

    generation = read(tokens_reply(PROMPT, [9, 9, 9], weight_versions=spans))

    assert generation.policy_version == 4
    assert generation.version_spans == ((4, 1), (5, 2))


def test_a_chat_reply_takes_the_version_from_before_the_request() -> None:
    generation = read(chat_reply(PROMPT, [9, END_ID]), weights=HELD)

    assert (generation.policy_version, generation.version_spans) == (4, ())


@pytest.mark.req("V-5", "M-11")
@pytest.mark.parametrize("seen", [[602, 607, 397], [602, 607, 607, 398], [], [*PROMPT, 1]])
def test_other_prompt_tokens_than_ours_are_a_mismatch(seen: list[int]) -> None:
    with pytest.raises(PromptMismatch, match=f"saw {len(seen)} prompt tokens, ours are 4"):
        read(tokens_reply(seen, [9, END_ID]))


@pytest.mark.req("V-5")
def test_a_server_that_does_not_say_what_it_saw_is_refused() -> None:
    reply = tokens_reply(PROMPT, [9, END_ID])
    reply["prompt_token_ids"] = None

    with pytest.raises(ServerRefused, match="return_token_ids"):
        read(reply)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"token_ids": None}, "token_ids"),
        ({"token_ids": []}, "at least one"),
        ({"token_ids": [1, "2"]}, "token_ids"),
        ({"token_ids": [1, -2]}, "token_ids"),
        ({"token_ids": [1, True]}, "token_ids"),
        ({"token_ids": [1 << 31, END_ID]}, "token_ids"),
        ({"token_ids": [END_ID, 9]}, "goes on after its end token"),
        ({"token_ids": [9, 9, 9, END_ID]}, "expected at most 3"),
        ({"token_ids": [9, 9], "finish_reason": "abort"}, "ended by 'abort'"),
        ({"token_ids": [9, 9], "finish_reason": "stop"}, "without an end token"),
        ({"logprobs": None}, "log-probabilities"),
        ({"logprobs": {"content": [{"logprob": -1.0}]}}, "1 log-probabilities for 2 tokens"),
        ({"logprobs": {"content": [{"logprob": None}, {"logprob": -1.0}]}}, "log-probabilities"),
        ({"weight_versions": []}, "cover 0 of 2"),
        ({"weight_versions": [{"version": "4:/p/v4", "start": 0, "end": 1}]}, "cover 1 of 2"),
        ({"weight_versions": [{"version": "4:/p/v4", "start": 1, "end": 2}]}, "do not follow"),
        ({"weight_versions": [{"version": "4:/p/v4", "start": 0, "end": "x"}]}, "cannot be read"),
        ({"weight_versions": "4"}, "cannot be read"),
        ({"weight_versions": [{"version": "default", "start": 0, "end": 2}]}, "'default'"),
        ({"weight_versions": [{"version": "loading 4:/p/v4", "start": 0, "end": 2}]}, "'loading 4:/p/v4'"),
        ({"weight_versions": None}, "unknown weights"),
    ],
)
def test_a_reply_that_cannot_be_is_a_failure_with_its_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ServerFailed, match=f"POST one.*{message}"):
        read(tokens_reply(PROMPT, [9, END_ID], **changes))


@pytest.mark.parametrize("choices", [None, [], "x", [None], [{}, {}]])
def test_anything_but_one_choice_is_a_failure(choices: object) -> None:
    reply = {**tokens_reply(PROMPT, [9, END_ID]), "choices": choices}

    with pytest.raises(ServerFailed, match="one choice"):
        read(reply)


def test_a_server_that_cuts_early_is_told_to_have_more_room() -> None:
    with pytest.raises(ServerRefused, match="--max-model-len"):
        read(tokens_reply(PROMPT, [9, 9]))


@pytest.mark.req("V-2")
def test_a_label_survives_its_text_and_tells_runs_apart() -> None:
    label = WeightLabel(policy_version=12, weights_path="/runs/demo/policy/v12")

    assert parse_label(str(label)) == label
    assert label.covers(WeightLabel(policy_version=11, weights_path="/runs/demo/policy/v11"))
    assert not label.covers(WeightLabel(policy_version=13, weights_path="/runs/demo/policy/v13"))
    assert not label.covers(WeightLabel(policy_version=3, weights_path="/runs/other/policy/v3"))


@pytest.mark.parametrize("text", ["default", "", "7", "7:", "loading 7:/p", "-1:/p", "None", "x:/p"])
def test_a_label_that_is_not_ours_is_none(text: str) -> None:
    assert parse_label(text) is None
