"""Every removed key of the design is refused, all in one message, each with its replacement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.removed_keys import REMOVED_KEYS
from tests.builders.configs import METHOD, make_mapping, put, refusal

DECODE = "use custom.extra.rollout_matching.decode_batch_size"
ASYNC = "choose custom.trainer_variant: stage2_async; the queue's keys are stage2_async.*"
DESIGN_TABLE: list[tuple[str, Any, str]] = [
    ("stage2_ab.channel_b.mode", "async", ASYNC),
    ("stage2_ab.channel_b.async.queue_limit", 4, f"{ASYNC}, here stage2_async.queue_limit"),
    ("stage2_ab.channel_b.async.anything", 4, ASYNC),
    ("stage2_ab.channel_b.async", {}, ASYNC),
    ("stage2_ab.channel_b.async", None, ASYNC),
    ("stage2_ab.channel_b.rollouts_per_step", 8, "use training.effective_batch_size"),
    ("stage2_ab.channel_b.enable_pipeline", True, "overlap is automatic"),
    ("stage2_ab.channel_b.rollout_decode_batch_size", 4, DECODE),
    (f"{METHOD}.rollout_generate_batch_size", 4, DECODE),
    (f"{METHOD}.rollout_infer_batch_size", 4, DECODE),
    (f"{METHOD}.temperature", 0.7, f"use {METHOD}.decoding.temperature"),
    (f"{METHOD}.top_p", 0.9, f"use {METHOD}.decoding.top_p"),
    (f"{METHOD}.top_k", 3, f"use {METHOD}.decoding.top_k"),
    (f"{METHOD}.rollout_buffer", {"size": 3}, "every rollout is trained at most once"),
    (f"{METHOD}.post_rollout_pack_scope", "window", "the variant decides"),
    ("stage2_ab.schedule.pattern", "AAB", "use stage2_ab.schedule.b_ratio"),
    ("training.packing_length", 4096, "use training.global_max_length"),
]


@pytest.mark.req("S-5")
@pytest.mark.parametrize("key, value, replacement", DESIGN_TABLE)
def test_a_removed_key_is_refused_with_its_replacement(
    tmp_path: Path, key: str, value: Any, replacement: str
) -> None:
    mapping = make_mapping("stage2_ab_training")
    put(mapping, key, value)

    report = refusal(tmp_path, mapping)

    assert f"{key}" in report
    assert "this key is removed; " in report
    assert replacement in report
    assert "1 problem\n" in report


@pytest.mark.req("S-5")
def test_the_table_of_the_program_holds_every_key_of_the_design() -> None:
    known = {removed.name for removed in REMOVED_KEYS}

    assert {key.removesuffix(".anything").removesuffix(".queue_limit") for key, _, _ in DESIGN_TABLE} <= known


@pytest.mark.req("S-5")
def test_all_removed_keys_come_in_one_message(tmp_path: Path) -> None:
    mapping = make_mapping("stage2_ab_training")
    keys = [(key, value) for key, value, _ in DESIGN_TABLE if key != "stage2_ab.channel_b.async"]
    for key, value in keys:
        put(mapping, key, value)

    report = refusal(tmp_path, mapping)

    assert len(report.splitlines()) == 1 + len(keys)
    for key, _ in keys:
        assert f": {key}" in report


@pytest.mark.req("S-5", "S-6")
def test_an_unknown_key_beside_a_removed_one_is_told_as_well(tmp_path: Path) -> None:
    mapping = make_mapping()
    put(mapping, "stage2_ab.channel_b", {"mode": "async", "rolouts": 3})

    report = refusal(tmp_path, mapping)

    assert "stage2_ab.channel_b.mode: this key is removed" in report
    assert "stage2_ab.channel_b: unknown key (holding rolouts)" in report


@pytest.mark.req("S-5")
def test_a_removed_key_given_as_an_override_is_refused(tmp_path: Path) -> None:
    report = refusal(tmp_path, make_mapping(), "training.packing_length=12000")

    assert "override training.packing_length: training.packing_length: this key is removed" in report
