"""Request bodies for vLLM's two endpoints and the reading of their replies. Pure.

``tokens`` takes prompt token ids and reports which weights sampled each token; ``chat`` is what a server
without ``--enable-scale-out`` has: it renders the prompt itself, and says what it saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from broker_schemas.errors import PromptMismatch, ServerFailed, ServerRefused
from broker_schemas.rollout_servers.weight_label import WeightLabel, parse_label
from producers.rollout_backend import DecodingSettings, Generation

Dialect = Literal["tokens", "chat"]
MAX_TOKEN_ID: Final = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class PromptRequest:
    """One rollout to generate.

    ``prompt_token_ids`` (P,) int32 is what the model must see, ``unexpanded_ids`` the same with one token an
    image, ``messages`` the same as a chat whose ``{"type": "image"}`` parts stand for ``image_urls``
    (data URLs). ``end_token_id`` closes the answer.
    """

    prompt_token_ids: NDArray[np.int32]
    unexpanded_ids: tuple[int, ...]
    messages: Sequence[Mapping[str, Any]]
    image_urls: tuple[str, ...]
    grids_thw: tuple[tuple[int, int, int], ...]
    seed: int
    end_token_id: int


def build_body(
    request: PromptRequest, model: str, decoding: DecodingSettings, dialect: Dialect
) -> dict[str, Any]:
    """Return the JSON body; every sampling parameter is said, so that no default of the server applies."""
    sampling: dict[str, Any] = {
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        # 0 switches it off in every version of the server
        "top_k": max(decoding.top_k, 0),
        "min_p": 0.0,
        "repetition_penalty": decoding.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": decoding.max_new_tokens,
        "seed": request.seed,
        "n": 1,
        "stop_token_ids": [request.end_token_id],
        # the checkpoint may name more end tokens than the one that ends a rollout
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    if dialect == "tokens":
        parts = [{"type": "image_url", "url": url} for url in request.image_urls]
        return {
            "model": model,
            "token_ids": list(request.unexpanded_ids),
            **({"content_parts": parts} if parts else {}),
            "sampling_params": {**sampling, "logprobs": 0, "detokenize": False},
            "return_token_ids": True,
        }
    return {
        "model": model,
        "messages": _with_images(request.messages, request.image_urls),
        **sampling,
        "logprobs": True,
        "top_logprobs": 0,
        "return_token_ids": True,
        "add_generation_prompt": True,
    }


def _with_images(messages: Sequence[Mapping[str, Any]], urls: Sequence[str]) -> list[dict[str, Any]]:
    left = iter(urls)

    def fill(part: Mapping[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return dict(part)
        return {"type": "image_url", "image_url": {"url": next(left)}}

    return [{**message, "content": [fill(part) for part in message["content"]]} for message in messages]


def read_generation(
    body: Mapping[str, Any],
    request: PromptRequest,
    decoding: DecodingSettings,
    *,
    where: str,
    weights: WeightLabel | None,
) -> Generation:
    """Return the generation in a reply of either endpoint.

    ``weights`` is what the server held before the request, for replies that do not say [V-5].
    Raises PromptMismatch, ServerRefused where the server's settings do not fit ours, ServerFailed for a
    reply that cannot be.
    """
    choices = body.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ServerFailed(f"{where}: expected one choice in the reply, got {str(choices)[:100]}")
    choice = choices[0]
    _check_prompt(body, choice, request, where)
    response = _token_ids(choice.get("token_ids"), where)
    finish_reason = _finish_reason(choice, response, request, decoding, where)
    spans = _version_spans(choice.get("weight_versions"), len(response), weights, where)
    return Generation(
        prompt_token_ids=request.prompt_token_ids,
        response_token_ids=response,
        response_logprobs=_logprobs(choice, len(response), where),
        grids_thw=request.grids_thw,
        finish_reason=finish_reason,
        policy_version=min(policy_version for policy_version, _ in spans),
        version_spans=spans if len(spans) > 1 else (),
    )


def _check_prompt(
    body: Mapping[str, Any], choice: Mapping[str, Any], request: PromptRequest, where: str
) -> None:
    seen = body.get("prompt_token_ids")
    if seen is None:
        seen = choice.get("prompt_token_ids")
    if seen is None:
        raise ServerRefused(
            f"{where}: no prompt_token_ids in the reply, so the prompt cannot be compared with ours; "
            "use a vLLM that knows return_token_ids"
        )
    ours = request.prompt_token_ids.tolist()
    if seen == ours:
        return
    same = next((i for i, pair in enumerate(zip(seen, ours, strict=False)) if pair[0] != pair[1]), None)
    place = min(len(seen), len(ours)) if same is None else same
    raise PromptMismatch(
        f"{where}: the server saw {len(seen)} prompt tokens, ours are {len(ours)}, first different at "
        f"{place}; serve the same model folder with the run's image bounds ('rollstream serve vllm' does)"
    )


def _token_ids(value: Any, where: str) -> NDArray[np.int32]:
    is_list = isinstance(value, list) and len(value) > 0
    if not is_list or not all(type(item) is int and 0 <= item <= MAX_TOKEN_ID for item in value):
        raise ServerFailed(f"{where}: token_ids is {str(value)[:100]}, expected at least one token id")
    return np.asarray(value, dtype=np.int32)


def _finish_reason(
    choice: Mapping[str, Any],
    response: NDArray[np.int32],
    request: PromptRequest,
    decoding: DecodingSettings,
    where: str,
) -> Literal["stop", "length"]:
    reason, num_tokens = choice.get("finish_reason"), len(response)
    ends = np.flatnonzero(response == request.end_token_id)
    if len(ends) and ends[0] != num_tokens - 1:
        raise ServerFailed(f"{where}: goes on after its end token, at {ends[0]} of {num_tokens} tokens")
    if num_tokens > decoding.max_new_tokens:
        raise ServerFailed(f"{where}: got {num_tokens} tokens, expected at most {decoding.max_new_tokens}")
    if len(ends):
        return "stop"
    if reason == "length" and num_tokens == decoding.max_new_tokens:
        return "length"
    if reason == "length":
        raise ServerRefused(
            f"{where}: cut at {num_tokens} tokens, expected up to max_new_tokens {decoding.max_new_tokens}; "
            "serve with a larger --max-model-len"
        )
    raise ServerFailed(f"{where}: ended by {reason!r} after {num_tokens} tokens without an end token")


def _logprobs(choice: Mapping[str, Any], num_tokens: int, where: str) -> NDArray[np.float32]:
    try:
        values = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]
    except (KeyError, TypeError, ValueError) as exc:
        raise ServerFailed(f"{where}: log-probabilities are missing or no numbers ({exc!r})") from exc
    if len(values) != num_tokens:
        raise ServerFailed(f"{where}: got {len(values)} log-probabilities for {num_tokens} tokens")
    return np.asarray(values, dtype=np.float32)


def _version_spans(
    value: Any, num_tokens: int, weights: WeightLabel | None, where: str
) -> tuple[tuple[int, int], ...]:
    """Return (policy version, number of tokens) in order, neighbours of one version joined."""
    if value is None:
        return ((_version_of(weights, "unknown weights", where), num_tokens),)
    spans: list[tuple[int, int]] = []
    covered = 0
    for entry in value if isinstance(value, list) else [value]:
        start, end, text = _span(entry, where)
        if start != covered or end <= start:
            raise ServerFailed(f"{where}: weight_versions {str(value)[:200]} do not follow each other")
        covered = end
        policy_version = _version_of(parse_label(text), text, where)
        if spans and spans[-1][0] == policy_version:
            spans[-1] = (policy_version, spans[-1][1] + end - start)
        else:
            spans.append((policy_version, end - start))
    if covered != num_tokens:
        raise ServerFailed(f"{where}: weight_versions cover {covered} of {num_tokens} tokens")
    return tuple(spans)


def _span(entry: Any, where: str) -> tuple[int, int, str]:
    try:
        return int(entry["start"]), int(entry["end"]), str(entry["version"])
    except (KeyError, TypeError, ValueError) as exc:
        raise ServerFailed(f"{where}: weight_versions entry {str(entry)[:100]} cannot be read") from exc


def _version_of(label: WeightLabel | None, text: str, where: str) -> int:
    if label is None:
        raise ServerFailed(f"{where}: generated with {text!r}, expected weights of a published policy")
    return label.policy_version
