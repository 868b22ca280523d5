"""Checks that look at several keys at once; each problem names those keys, the leading one first."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from broker_schemas.method.evaluation_numbers import NUMBERS
from configs.ignored_settings import METHOD, VARIANT, refuse_ignored
from configs.model_size_checks import check_model_size
from configs.problems import KeyPath, Problem
from configs.schema import AB_VARIANTS, RunConfig

BATCH: KeyPath = ("training", "effective_batch_size")
PER_DEVICE: KeyPath = ("training", "per_device_train_batch_size")
GA: KeyPath = ("training", "gradient_accumulation_steps")
WORLD_SIZE: KeyPath = ("devices", "learner_world_size")
QUEUE_LIMIT: KeyPath = ("stage2_async", "queue_limit")
PREFETCH: KeyPath = ("stage2_async", "prefetch_target_packs")
EARLY_STOP_TARGET: KeyPath = ("training", "early_stop", "target")
EARLY_STOP_METRIC: KeyPath = ("training", "early_stop", "metric")
BATCH_KEYS = (BATCH, PER_DEVICE, WORLD_SIZE)


def cross_check(config: RunConfig, explicit: frozenset[KeyPath]) -> list[Problem]:
    """All problems across sections; `explicit` are the keys that someone wrote. Empty = it can run."""
    return [
        *_batch_contract(config),
        *_queue(config),
        *_schedule(config),
        *_lengths(config),
        *_packing(config),
        *_model_and_data(config),
        *_method(config),
        *_devices(config),
        *_chunk(config),
        *_evaluation(config),
        *_early_stop(config),
        *check_model_size(config),
        *_broker(config),
        *refuse_ignored(config, explicit),
    ]


def nearest_multiples(value: int, divisor: int) -> list[int]:
    """The positive multiples of `divisor` next to `value`, below and above: one or two, ascending."""
    below = value // divisor * divisor
    return [multiple for multiple in (below, below + divisor) if multiple > 0]


def _divides(config: RunConfig) -> bool:
    return config.training.effective_batch_size % config.rollouts_per_micro_step == 0


def _batch_contract(config: RunConfig) -> Iterator[Problem]:
    training, world_size = config.training, config.learner_world_size
    batch, per_device = training.effective_batch_size, training.per_device_train_batch_size
    product = f"per_device_train_batch_size {per_device} x learner_world_size {world_size}"
    micro = config.rollouts_per_micro_step
    if not _divides(config):
        nearest = " or ".join(str(n) for n in nearest_multiples(batch, micro))
        message = f"got {batch}, expected a multiple of {product} = {micro}; the nearest that work: {nearest}"
        yield Problem(message=message, paths=(BATCH, PER_DEVICE, WORLD_SIZE))
        return
    ga, wanted = config.gradient_accumulation_steps, training.gradient_accumulation_steps
    if wanted is not None and wanted != ga:
        message = (
            f"got {wanted}, but effective_batch_size {batch} / ({product}) = {ga}; leave the key out, "
            f"or set it to {ga}, or set effective_batch_size to {wanted * micro}"
        )
        yield Problem(message=message, paths=(GA, *BATCH_KEYS))


def _evaluation(config: RunConfig) -> Iterator[Problem]:
    if config.evaluation.in_stack and config.b_ratio == 0:
        message = "got true, but a run without B steps has no producers; take it out: the learner evaluates"
        yield Problem(
            message=message, paths=(("evaluation", "in_stack"), ("stage2_ab", "schedule", "b_ratio"))
        )


def _early_stop(config: RunConfig) -> Iterator[Problem]:
    stop = config.training.early_stop
    if stop.target is None or stop.target <= 1 or NUMBERS[stop.metric].form == "count":
        return
    message = f"got {stop.target:g}, but {stop.metric} is a share from 0 to 1; set 0.6 for 60 %"
    yield Problem(message=message, paths=(EARLY_STOP_TARGET, EARLY_STOP_METRIC))


def _queue(config: RunConfig) -> Iterator[Problem]:
    if config.variant != "stage2_async":
        return
    queue, ga = config.stage2_async, config.gradient_accumulation_steps
    if _divides(config):
        for path, value in ((QUEUE_LIMIT, queue.queue_limit), (PREFETCH, queue.prefetch_target_packs)):
            if value < ga:
                message = (
                    f"got {value}, but a rollout step takes GA = {ga} packs per rank (effective_batch_size "
                    f"{config.training.effective_batch_size} / {config.rollouts_per_micro_step}) and could "
                    f"never be claimed; set at least {ga}"
                )
                yield Problem(message=message, paths=(path, *BATCH_KEYS, VARIANT))
    if queue.prefetch_target_packs > queue.queue_limit:
        message = (
            f"got {queue.prefetch_target_packs}, above queue_limit {queue.queue_limit}: producers would make "
            f"packs only to drop them; lower it, or raise stage2_async.queue_limit"
        )
        yield Problem(message=message, paths=(PREFETCH, QUEUE_LIMIT, VARIANT))


def _schedule(config: RunConfig) -> Iterator[Problem]:
    if config.variant in AB_VARIANTS and config.stage2_ab.schedule.b_ratio is None:
        message = f"is required for {config.variant}: the share of rollout steps, a decimal from 0 to 1"
        yield Problem(message=message, paths=(("stage2_ab", "schedule", "b_ratio"), VARIANT))
    training = config.training
    if training.warmup_steps > training.max_steps:
        message = f"got {training.warmup_steps}, above max_steps {training.max_steps}; lower it"
        yield Problem(message=message, paths=(("training", "warmup_steps"), ("training", "max_steps")))
    if training.eval_every_steps and config.data.val_jsonl is None:
        message = "evaluation needs data.val_jsonl; set that, or set this to 0"
        yield Problem(message=message, paths=(("training", "eval_every_steps"), ("data", "val_jsonl")))


def _lengths(config: RunConfig) -> Iterator[Problem]:
    max_new, capacity = config.rollout_matching.max_new_tokens, config.training.global_max_length
    if max_new >= capacity:
        message = (
            f"got {max_new}, but prompt, image and rollout together must fit training.global_max_length "
            f"{capacity}; lower this or raise that"
        )
        yield Problem(message=message, paths=((*METHOD, "max_new_tokens"), ("training", "global_max_length")))


def _packing(config: RunConfig) -> Iterator[Problem]:
    training = config.training
    if not training.packing:
        message = "got false, expected true: the learner runs packed rows only; take the key out"
        yield Problem(message=message, paths=(("training", "packing"),))
    if not training.packing_drop_last:
        message = "got false, expected true: a leftover that fills no pack is never padded; take the key out"
        yield Problem(message=message, paths=(("training", "packing_drop_last"),))
    needed = config.rollouts_per_rank_per_step
    if config.variant != "stage2_async" and _divides(config) and training.packing_buffer < needed:
        message = (
            f"got {training.packing_buffer}, but a step has {needed} segments per rank; set at least {needed}"
        )
        yield Problem(message=message, paths=(("training", "packing_buffer"), *BATCH_KEYS, VARIANT))


def _model_and_data(config: RunConfig) -> Iterator[Problem]:
    name, inline = ("model", "name_or_path"), ("model", "config")
    if (config.model.name_or_path is None) == (config.model.config is None):
        got = "neither" if config.model.config is None else "both"
        message = f"got {got} of name_or_path and config, expected one: a checkpoint, or an inline tiny model"
        yield Problem(message=message, paths=(name, inline))
    yield from _tiny_model(config)
    low, high = config.model.image.min_pixels, config.model.image.max_pixels
    if low is not None and high is not None and low > high:
        message = f"got {low}, above max_pixels {high}; lower it"
        yield Problem(
            message=message, paths=(("model", "image", "min_pixels"), ("model", "image", "max_pixels"))
        )


def _tiny_model(config: RunConfig) -> Iterator[Problem]:
    tiny = config.model.config
    if tiny is None:
        return
    for whole, parts in (
        ("text_hidden", "text_heads"),
        ("text_heads", "text_key_value_heads"),
        ("vision_hidden", "vision_heads"),
    ):
        size, count = getattr(tiny, whole), getattr(tiny, parts)
        if size % count:
            nearest = " or ".join(str(n) for n in nearest_multiples(size, count))
            message = f"got {size}, expected a multiple of {parts} {count}; the nearest that work: {nearest}"
            yield Problem(message=message, paths=(("model", "config", whole), ("model", "config", parts)))
    beyond = [layer for layer in tiny.deepstack_layers if layer >= tiny.vision_layers]
    if beyond:
        message = f"names layer {_numbers(beyond)}, but vision_layers is {tiny.vision_layers}, counted from 0"
        paths: tuple[KeyPath, ...] = (
            ("model", "config", "deepstack_layers"),
            ("model", "config", "vision_layers"),
        )
        yield Problem(message=message, paths=paths)


def _method(config: RunConfig) -> Iterator[Problem]:
    method = config.rollout_matching
    weights = ("soft_ce_weight", "w1_weight", "gate_weight")
    if method.soft_ce_weight == method.w1_weight == method.gate_weight == 0:
        message = "soft_ce_weight, w1_weight and gate_weight are all 0: coordinates would not be trained"
        yield Problem(message=message, paths=tuple((*METHOD, weight) for weight in weights))
    if method.rollout_backend != "vllm":
        return
    servers_path = (*METHOD, "vllm", "server", "servers")
    urls = [server.base_url for server in method.vllm.server.servers]
    if not urls:
        message = "rollout_backend vllm needs at least one server; add `- base_url: http://host:port`"
        yield Problem(message=message, paths=(servers_path, (*METHOD, "rollout_backend")))
    for url in sorted({url for url in urls if urls.count(url) > 1}):
        yield Problem(message=f"{url} stands here more than once; keep one", paths=(servers_path,))
    if method.vllm.sync.mode == "full" and not method.vllm.sync.fallback_to_full:
        message = "got false, expected true: with sync.mode full there is no other way; take the key out"
        yield Problem(message=message, paths=((*METHOD, "vllm", "sync", "fallback_to_full"),))


def _devices(config: RunConfig) -> Iterator[Problem]:
    rollout, learner = config.devices.rollout_gpus, config.devices.learner_gpus
    rollout_path, learner_path = ("devices", "rollout_gpus"), ("devices", "learner_gpus")
    for path, gpus in ((rollout_path, rollout), (learner_path, learner)):
        twice = sorted({gpu for gpu in gpus if gpus.count(gpu) > 1})
        if twice:
            yield Problem(message=f"names GPU {_numbers(twice)} more than once; keep one", paths=(path,))
    shared = sorted(set(rollout) & set(learner))
    if shared:
        message = f"GPU {_numbers(shared)} is also in learner_gpus; the two sets must be disjoint"
        yield Problem(message=message, paths=(rollout_path, learner_path))
    if learner and config.learner_world_size % len(learner):
        message = (
            f"names {len(learner)} GPUs, but devices.learner_world_size is {config.learner_world_size}; "
            f"each rank has one GPU, and every node the same number of them"
        )
        yield Problem(message=message, paths=(learner_path, WORLD_SIZE))


def _chunk(config: RunConfig) -> Iterator[Problem]:
    """Refuse what servers of this machine cannot give every rank [S-4]; others say it when they answer."""
    method, gpus = config.rollout_matching, config.devices.rollout_gpus
    urls = [server.base_url for server in method.vllm.server.servers]
    if method.rollout_backend != "vllm" or config.b_ratio == 0 or not all(map(_is_here, urls)) or not urls:
        return
    num_workers = max(len(gpus), len(urls))
    decode, num_ranks = method.decode_batch_size, config.learner_world_size
    if decode * num_workers < num_ranks:
        message = (
            f"got {decode}, expected {-(-num_ranks // num_workers)} or more: {len(urls)} servers on "
            f"{len(gpus)} rollout GPUs give {decode * num_workers} rollouts at once, expected at least one "
            f"for each of {num_ranks} learner ranks; raise it, use fewer ranks, "
            "or name the servers' GPUs in devices.rollout_gpus"
        )
        yield Problem(
            message=message, paths=((*METHOD, "decode_batch_size"), ("devices", "rollout_gpus"), WORLD_SIZE)
        )


def _is_here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in {"localhost", "::1"} or host.startswith("127.")


def _numbers(gpus: list[int]) -> str:
    return ", ".join(str(gpu) for gpu in gpus)


def _broker(config: RunConfig) -> Iterator[Problem]:
    tls = config.broker.tls
    if (tls.cert_file is None) != (tls.key_file is None):
        message = "cert_file and key_file belong together; set both or neither"
        yield Problem(message=message, paths=(("broker", "tls", "cert_file"), ("broker", "tls", "key_file")))
