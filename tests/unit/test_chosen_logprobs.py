"""Log-probabilities of `hf` rollouts are the model's own, whatever is done to the scores afterwards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from broker_schemas.method.dataset import Sample
from producers.hf_backend import HfBackend
from producers.rollout_backend import Generation
from tests.builders.settings import decoding_settings, hf_backend_settings

PROMPT = np.asarray([5, 9, 5, 11], np.int32)
END = 39


def a_model() -> Any:
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = cast(Any, LlamaForCausalLM)(LlamaConfig(vocab_size=40, **sizes)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def generate(model: Any, **decoding: Any) -> Generation:
    prompts: Any = SimpleNamespace(build_ids=lambda grids: PROMPT, end_token_id=END, image_token_id=2)
    settings = hf_backend_settings(decoding=decoding_settings(max_new_tokens=12, **decoding))
    backend = HfBackend(prompts, cast(Any, SimpleNamespace(fingerprint="p")), settings, model)
    sample = Sample(
        sample_id="s", image_paths=(), image_files=(), task="empty", objects=(), width=8, height=8
    )
    return backend.generate([sample], [7])[0]


@pytest.mark.req("U-5")
@pytest.mark.parametrize(
    "decoding",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1.3, "temperature": 0.7, "top_p": 0.8, "top_k": 5},
        {},
    ],
)
def test_they_are_taken_before_penalty_temperature_and_cuts(decoding: dict[str, Any]) -> None:
    model = a_model()
    said = generate(model, **decoding)
    ids = torch.from_numpy(np.concatenate([PROMPT, said.response_token_ids]).astype(np.int64))
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids[None]).logits[0].float(), dim=-1)
    own = logprobs[len(PROMPT) - 1 : -1].gather(1, ids[len(PROMPT) :, None])[:, 0]
    np.testing.assert_allclose(said.response_logprobs, own.numpy(), atol=1e-4)


def test_the_penalty_still_decides_what_is_written() -> None:
    model = a_model()
    plain, punished = generate(model), generate(model, repetition_penalty=1.3)
    wanted = model.generate(
        input_ids=torch.from_numpy(PROMPT.astype(np.int64))[None],
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.3,
        eos_token_id=END,
        pad_token_id=END,
    )[0, len(PROMPT) :]
    assert punished.response_token_ids.tolist() == wanted[: len(punished.response_token_ids)].tolist()
    assert punished.response_token_ids.tolist() != plain.response_token_ids.tolist()
