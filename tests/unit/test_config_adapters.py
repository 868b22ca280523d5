"""L-5, S-5: what a configuration may say about adapters, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broker_schemas.errors import ConfigError
from tests.builders.configs import load_mapping, make_mapping

SERVED = {"rollout_backend": "vllm", "vllm": {"server": {"servers": [{"base_url": "http://127.0.0.1:8000"}]}}}


def adapter_mapping(method: dict[str, Any], training: dict[str, Any], **sections: Any) -> dict[str, Any]:
    mapping = make_mapping("stage2_async", **sections)
    mapping["custom"]["extra"]["rollout_matching"].update(method)
    mapping["training"].update(training)
    return mapping


@pytest.mark.req("L-5")
@pytest.mark.parametrize(
    "method, training",
    [
        ({}, {"lora": {"rank": 16, "dora": True, "dropout": 0.1}}),
        ({}, {"lora": {"rank": 4}, "learning_rates": {"coordinates": 1e-4}, "freeze": ["text"]}),
        (SERVED, {"lora": {"rank": 16, "targets": ["q_proj", "qkv"]}}),
    ],
)
def test_adapters_that_can_be_trained_and_served_load(
    tmp_path: Path, method: dict[str, Any], training: dict[str, Any]
) -> None:
    loaded = load_mapping(tmp_path, adapter_mapping(method, training))
    assert loaded.training.lora.rank == training["lora"]["rank"]


@pytest.mark.req("L-5", "S-5")
@pytest.mark.parametrize(
    "method, training, said",
    [
        ({}, {"learning_rates": {"coordinates": 1e-4}}, "is for the rows that are trained beside adapters"),
        ({}, {"lora": {"rank": 0}}, "training.lora.rank"),
        ({}, {"lora": {"rank": 4, "targets": []}}, "training.lora.targets"),
        ({}, {"lora": {"rank": 4, "targets": ["q_proj", "q_proj"]}}, "names q_proj more than once"),
        ({}, {"lora": {"dropout": 0.1}}, "training.lora.rank is not set"),
        (SERVED, {"lora": {"rank": 4, "dora": True}}, "vLLM serves no DoRA adapters"),
    ],
)
def test_adapters_that_could_not_be_are_refused(
    tmp_path: Path, method: dict[str, Any], training: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_mapping(tmp_path, adapter_mapping(method, training))


@pytest.mark.req("L-7", "S-5")
def test_ways_of_a_sync_that_adapters_do_not_know_are_refused(tmp_path: Path) -> None:
    sent = {**SERVED, "vllm": {**SERVED["vllm"], "sync": {"mode": "transfer"}}}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="servers load adapters by their path; set full"):
        load_mapping(tmp_path, adapter_mapping(sent, {"lora": {"rank": 4}}))
    kept = adapter_mapping(SERVED, {"lora": {"rank": 4}})
    kept.setdefault("stage2_async", {})["in_flight_sync"] = "keep"
    with pytest.raises(ConfigError, match="holds on to the adapter that it began with"):
        load_mapping(tmp_path, kept)
