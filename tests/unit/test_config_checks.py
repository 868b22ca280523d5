"""Ranges of single keys, checks across keys, and settings that would have no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.cross_checks import nearest_multiples
from tests.builders.configs import METHOD, load_mapping, make_mapping, put, refusal

VARIANTS = ("rollout_matching_sft", "stage2_ab_training", "stage2_async")


def with_method(mapping: dict[str, Any], **values: Any) -> dict[str, Any]:
    for name, value in values.items():
        put(mapping, f"{METHOD}.{name.replace('__', '.')}", value)
    return mapping


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_builder_is_valid_for_every_variant(tmp_path: Path, variant: str) -> None:
    assert load_mapping(tmp_path, make_mapping(variant)).variant == variant


@pytest.mark.req("V-3")
@pytest.mark.parametrize(
    "key, value",
    [
        ("temperature", -0.1),
        ("temperature", ".inf"),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", 0),
        ("top_k", -2),
        ("top_k", 1.5),
    ],
)
def test_sampling_settings_out_of_range_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    mapping = with_method(make_mapping(), decoding__temperature=1.0)
    put(mapping, f"{METHOD}.decoding.{key}", value)

    assert f"{METHOD}.decoding.{key}: got " in refusal(tmp_path, mapping)


@pytest.mark.req("V-3")
@pytest.mark.parametrize(
    "decoding",
    [
        {"temperature": 0},
        {"temperature": 0.0, "top_p": 1.0, "top_k": -1},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 1},
        {"temperature": 1, "top_p": 1},
    ],
)
def test_sampling_settings_in_range_load(tmp_path: Path, decoding: dict[str, Any]) -> None:
    loaded = load_mapping(tmp_path, with_method(make_mapping(), decoding=decoding)).rollout_matching.decoding

    assert loaded.model_dump(include=set(decoding)) == decoding


@pytest.mark.req("M-1")
@pytest.mark.parametrize(
    "key, value",
    [
        ("candidate_top_k", 0),
        ("maskiou_gate", 1.1),
        ("maskiou_gate", -0.1),
        ("maskiou_resolution", 1),
        ("fp_cost", -1),
        ("fn_cost", -1),
        ("ot_points", 0),
        ("ot_epsilon", 0),
        ("ot_iters", 0),
        ("ot_cost", "l3"),
        ("target_sigma", 0),
        ("target_truncate", -1),
        ("temperature_coord", 0),
        ("soft_ce_weight", -1),
        ("w1_weight", -1),
        ("gate_weight", -1),
        ("repetition_penalty", 0),
        ("decode_batch_size", 0),
        ("max_new_tokens", 0),
        ("rollout_backend", "sglang"),
        ("debug_dump_parse_failures", 1),
    ],
)
def test_method_settings_out_of_range_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    assert f"{METHOD}.{key}: got {value!r}" in refusal(tmp_path, with_method(make_mapping(), **{key: value}))


@pytest.mark.req("P-8")
def test_the_pack_scope_is_micro_or_window_and_micro_by_default(tmp_path: Path) -> None:
    base = make_mapping("rollout_matching_sft")

    assert load_mapping(tmp_path, base).rollout_matching.post_rollout_pack_scope == "micro"
    for scope in ("micro", "window"):
        mapping = with_method(make_mapping("rollout_matching_sft"), post_rollout_pack_scope=scope)
        assert load_mapping(tmp_path, mapping).rollout_matching.post_rollout_pack_scope == scope
    for wrong in ("step", "", None, 1):
        mapping = with_method(make_mapping("rollout_matching_sft"), post_rollout_pack_scope=wrong)
        assert "expected 'micro' or 'window'" in refusal(tmp_path, mapping)


@pytest.mark.req("P-8", "S-5")
@pytest.mark.parametrize("variant", ["stage2_ab_training", "stage2_async"])
@pytest.mark.parametrize("scope", ["micro", "window", "nonsense"])
def test_the_pack_scope_is_refused_under_the_ab_variants(tmp_path: Path, variant: str, scope: str) -> None:
    report = refusal(tmp_path, with_method(make_mapping(variant), post_rollout_pack_scope=scope))

    assert "post_rollout_pack_scope: this key is removed; take it out; under this trainer variant" in report
    assert "1 problem\n" in report


@pytest.mark.req("S-2")
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_indivisible_batch_is_refused_with_numbers_and_nearest_values(
    tmp_path: Path, variant: str
) -> None:
    report = refusal(tmp_path, make_mapping(variant, training__effective_batch_size=21))

    assert (
        "training.effective_batch_size: got 21, expected a multiple of per_device_train_batch_size 4 x "
        "learner_world_size 2 = 8; the nearest that work: 16 or 24"
    ) in report


@pytest.mark.req("S-2")
@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(1, 60))
def test_nearest_multiples_are_the_closest_positive_ones(value: int, divisor: int) -> None:
    nearest = nearest_multiples(value, divisor)

    every = [n for n in range(1, value + divisor + 1) if n % divisor == 0]
    assert nearest == [n for n in every if n <= value][-1:] + [n for n in every if n > value][:1]


@pytest.mark.req("S-2")
def test_a_contradicting_ga_is_refused_with_the_values_that_work(tmp_path: Path) -> None:
    agreeing = make_mapping(training__gradient_accumulation_steps=2)
    assert load_mapping(tmp_path, agreeing).gradient_accumulation_steps == 2

    report = refusal(tmp_path, make_mapping(training__gradient_accumulation_steps=3))

    assert "training.gradient_accumulation_steps: got 3, but effective_batch_size 16 / " in report
    assert "= 2; leave the key out, or set it to 2, or set effective_batch_size to 24" in report


@pytest.mark.req("S-6")
@pytest.mark.parametrize(
    "queue, expected",
    [
        ({"queue_limit": 1, "prefetch_target_packs": 1}, ["queue_limit: got 1, but", "packs: got 1, but"]),
        ({"queue_limit": 8, "prefetch_target_packs": 1}, ["prefetch_target_packs: got 1, but"]),
        (
            {"queue_limit": 4, "prefetch_target_packs": 5},
            ["prefetch_target_packs: got 5, above queue_limit 4"],
        ),
        ({"queue_limit": 3}, ["prefetch_target_packs: got 4, above queue_limit 3"]),
    ],
)
def test_a_queue_that_could_never_serve_a_step_is_refused(
    tmp_path: Path, queue: dict[str, int], expected: list[str]
) -> None:
    report = refusal(tmp_path, make_mapping(stage2_async=queue))

    assert len(report.splitlines()) == 1 + len(expected)
    for text in expected:
        assert text in report


def test_the_smallest_queue_that_serves_a_step_loads(tmp_path: Path) -> None:
    config = load_mapping(tmp_path, make_mapping(stage2_async={"queue_limit": 2, "prefetch_target_packs": 2}))

    assert config.stage2_async.queue_limit == config.gradient_accumulation_steps == 2


@pytest.mark.req("S-1")
@pytest.mark.parametrize("variant", ["stage2_ab_training", "stage2_async"])
def test_the_ab_variants_need_a_b_ratio(tmp_path: Path, variant: str) -> None:
    mapping = make_mapping(variant)
    del mapping["stage2_ab"]

    assert f"stage2_ab.schedule.b_ratio: is required for {variant}" in refusal(tmp_path, mapping)


@pytest.mark.req("S-6")
@pytest.mark.parametrize(
    "variant, key, value",
    [
        ("stage2_ab_training", "stage2_async.queue_limit", 8),
        ("stage2_ab_training", "stage2_async.version_window", 2),
        ("stage2_ab_training", "stage2_async.in_flight_sync", "strict"),
        ("rollout_matching_sft", "stage2_async.sync_every_steps", 1),
        ("rollout_matching_sft", "stage2_async.prefetch_target_packs", 4),
        ("rollout_matching_sft", "stage2_ab.schedule.b_ratio", 0.5),
        ("rollout_matching_sft", "stage2_ab.desc_ce_weight", 1.0),
        ("rollout_matching_sft", "data.augment.jitter_px", 0.5),
        ("stage2_async", f"{METHOD}.vllm.mode", "server"),
        ("stage2_async", f"{METHOD}.vllm.server.servers", [{"base_url": "http://127.0.0.1:8000"}]),
        ("stage2_async", f"{METHOD}.vllm.server.timeout_s", 240.0),
        ("stage2_async", f"{METHOD}.decoding.top_p", 0.9),
        ("stage2_async", f"{METHOD}.decoding.top_k", 20),
        ("stage2_async", f"{METHOD}.debug_dump_max", 50),
        ("stage2_async", "broker.tls.ca_file", "ca.pem"),
        ("stage2_async", "broker.password_env", "PASSWORD"),
        ("stage2_async", "broker.username_env", "USERNAME"),
        ("stage2_async", "training.early_stop.target", 0.5),
        ("stage2_async", "metrics.host", "0.0.0.0"),
    ],
)
def test_a_written_setting_that_would_be_ignored_is_refused(
    tmp_path: Path, variant: str, key: str, value: Any
) -> None:
    mapping = make_mapping(variant)
    put(mapping, key, value)

    report = refusal(tmp_path, mapping)

    assert f"{key}: would be ignored: " in report
    assert "1 problem\n" in report


@pytest.mark.req("S-6")
@pytest.mark.parametrize(
    "changes",
    [
        {"stage2_async.stall_timeout_s": 60, "custom.trainer_variant": "stage2_ab_training"},
        {f"{METHOD}.debug_dump_max": 3, f"{METHOD}.debug_dump_parse_failures": True},
        {"broker.tls.ca_file": "ca.pem", "broker.url": "rediss://host:6380/1", "broker.password_env": "P"},
        {"training.early_stop.target": 0.5, "training.eval_every_steps": 10},
        {"metrics.host": "0.0.0.0", "metrics.base_port": 9400},
    ],
)
def test_the_same_setting_loads_where_it_has_an_effect(tmp_path: Path, changes: dict[str, Any]) -> None:
    mapping = make_mapping()
    for key, value in changes.items():
        put(mapping, key, value)

    load_mapping(tmp_path, mapping)


@pytest.mark.req("S-6")
def test_the_weight_of_repeats_is_refused_where_no_step_trains_rollouts(tmp_path: Path) -> None:
    mapping = with_method(make_mapping("stage2_ab_training"), duplicate_weight=0.1)
    load_mapping(tmp_path, mapping)
    put(mapping, "stage2_ab.schedule.b_ratio", 0)
    assert "duplicate_weight: would be ignored: stage2_ab.schedule.b_ratio is 0" in refusal(tmp_path, mapping)


def test_a_rollout_that_leaves_no_room_for_the_prompt_is_refused(tmp_path: Path) -> None:
    mapping = with_method(make_mapping(training__global_max_length=512), max_new_tokens=512)

    assert "max_new_tokens: got 512, but prompt, image and rollout together" in refusal(tmp_path, mapping)


@pytest.mark.req("V-7")
@pytest.mark.parametrize(
    "rollout, learner, expected",
    [
        ([0, 1, 2], [2, 1], "devices.rollout_gpus: GPU 1, 2 is also in learner_gpus"),
        ([0, 0], [], "devices.rollout_gpus: names GPU 0 more than once"),
        ([], [1, 1], "devices.learner_gpus: names GPU 1 more than once"),
        ([0], [1, 2, 3], "devices.learner_gpus: names 3 GPUs, but devices.learner_world_size is 2"),
        ([-1], [], "devices.rollout_gpus[0]: got -1"),
        (["0"], [], "devices.rollout_gpus[0]: got '0'"),
    ],
)
def test_gpu_sets_that_meet_or_do_not_fit_are_refused(
    tmp_path: Path, rollout: list[Any], learner: list[Any], expected: str
) -> None:
    mapping = make_mapping(devices__rollout_gpus=rollout, devices__learner_gpus=learner)

    assert expected in refusal(tmp_path, mapping)


@pytest.mark.req("V-7")
def test_disjoint_gpu_sets_load(tmp_path: Path) -> None:
    mapping = make_mapping(devices__rollout_gpus=[0], devices__learner_gpus=[1, 2])

    assert load_mapping(tmp_path, mapping).devices.learner_gpus == (1, 2)


@pytest.mark.req("P-5")
def test_a_leftover_can_never_be_flushed(tmp_path: Path) -> None:
    assert "packing_drop_last: got false, expected true" in refusal(
        tmp_path, make_mapping(training__packing_drop_last=False)
    )
    assert "training.packing: got false, expected true" in refusal(
        tmp_path, make_mapping(training__packing=False)
    )


@pytest.mark.req("P-4")
def test_a_buffer_that_cannot_hold_a_step_is_refused_where_steps_are_packed_alone(tmp_path: Path) -> None:
    report = refusal(tmp_path, make_mapping("stage2_ab_training", training__packing_buffer=7))

    assert "training.packing_buffer: got 7, but a step has 8 segments per rank; set at least 8" in report
    assert load_mapping(tmp_path, make_mapping("stage2_async", training__packing_buffer=7))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"model.config": {}}, "got both of name_or_path and config"),
        ({"model.name_or_path": None}, "got neither of name_or_path and config"),
        ({"model.image": {"min_pixels": 9, "max_pixels": 4}}, "min_pixels: got 9, above max_pixels 4"),
        (
            {"model": {"config": {"text_hidden": 100}}},
            "text_hidden: got 100, expected a multiple of text_heads 6; the nearest that work: 96 or 102",
        ),
        ({"model": {"config": {"deepstack_layers": [3]}}}, "names layer 3, but vision_layers is 3"),
        ({"model": {"config": {"layers": 3}}}, "model.config.layers: unknown key"),
        ({"training.warmup_steps": 49}, "warmup_steps: got 49, above max_steps 48"),
        ({"training.eval_every_steps": 5, "data.val_jsonl": None}, "evaluation needs data.val_jsonl"),
        ({f"{METHOD}.rollout_backend": "vllm"}, "rollout_backend vllm needs at least one server"),
        ({"run.name": "Has Spaces"}, "run.name: got 'Has Spaces', expected text to match pattern"),
        ({"run.name": "../up"}, "run.name: got '../up'"),
        ({"training.learning_rate": 0}, "training.learning_rate: got 0"),
        ({"training.adam_beta2": 1.0}, "training.adam_beta2: got 1.0"),
        ({"training.max_steps": True}, "training.max_steps: got True"),
        ({"training.max_steps": 10.0}, "training.max_steps: got 10.0"),
        ({"training.packing_selector": "best"}, "expected 'exact', 'binpacking' or 'fifo'"),
        ({"producers.lease_s": 3601}, "producers.lease_s: got 3601"),
        ({"producers.max_attempts": 0}, "producers.max_attempts: got 0"),
        ({"producers.job_timeout_s": 0}, "producers.job_timeout_s: got 0"),
        ({"broker.jobs_url": "redis://h"}, "broker.jobs_url: would be ignored"),
        ({"custom.trainer_variant": "ppo"}, "custom.trainer_variant: got 'ppo'"),
        ({"broker.tls.cert_file": "a", "broker.url": "rediss://h"}, "cert_file and key_file belong together"),
    ],
)
def test_other_contradictions_are_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    mapping = make_mapping()
    for key, value in changes.items():
        put(mapping, key, value)

    report = refusal(tmp_path, mapping)

    assert expected in report
    assert "1 problem\n" in report


def test_weights_that_train_no_coordinate_are_refused(tmp_path: Path) -> None:
    mapping = with_method(make_mapping(), soft_ce_weight=0, w1_weight=0, gate_weight=0)

    assert "coordinates would not be trained" in refusal(tmp_path, mapping)


@pytest.mark.parametrize(
    "servers, expected",
    [
        (["127.0.0.1:8000"], "expected http://host:port"),
        (["http://user:pw@host:1"], "without credentials"),
        (["http://host:99999"], "expected http://host:port"),
        (["http://a:1", "http://a:1/"], "http://a:1 stands here more than once"),
    ],
)
def test_wrong_server_addresses_are_refused(tmp_path: Path, servers: list[str], expected: str) -> None:
    entries = [{"base_url": url} for url in servers]
    mapping = with_method(make_mapping(), rollout_backend="vllm", vllm__server__servers=entries)

    assert expected in refusal(tmp_path, mapping)


@pytest.mark.parametrize("url", ["redis://localhost:6379/0", "rediss://host", "unix:///tmp/redis.sock"])
def test_broker_urls_load(tmp_path: Path, url: str) -> None:
    assert load_mapping(tmp_path, make_mapping(broker__url=url)).broker.url == url


@pytest.mark.parametrize(
    "key, value",
    [
        ("url", "redis://:hunter2@host:6379"),
        ("url", "redis://hunter2:x@host"),
        ("url", "redis://host?password=hunter2"),
        ("url", "http://hunter2"),
        ("url", "redis://host:hunter2"),
        ("password_env", "hunter2 is my password"),
        ("durability", "hunter2"),
        ("max_bytes", "hunter2"),
    ],
)
def test_a_refused_broker_value_is_never_printed(tmp_path: Path, key: str, value: str) -> None:
    mapping = make_mapping(broker={key: value})

    assert f"broker.{key}: got a value that is not shown" in refusal(tmp_path, mapping)
    assert "hunter2" not in refusal(tmp_path, mapping)
    assert "hunter2" not in refusal(tmp_path, make_mapping(), f"broker.{key}={value}")
