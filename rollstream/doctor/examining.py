"""`rollstream doctor`: everything a run needs, looked at before it starts, each with what to change."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from broker_schemas.errors import ConfigError, DataError, RollstreamError
from broker_schemas.method.coordinates import CoordVocabulary
from broker_schemas.method.model_folder import check_model_folder
from broker_schemas.method.trainability import REASONS, SampleReport, count_reasons
from configs import RunConfig
from consumers.joins import examine_join
from producers.chunking import InfeasibleChunk, chunk_per_rank
from rollstream.doctor.broker import examine_broker
from rollstream.doctor.findings import Finding, fail, ok, render_findings, warn
from rollstream.run_lock import StackLock
from rollstream.stack.ports_in_use import check_ports_free
from rollstream.stack.scrape_targets import metrics_ports
from rollstream.wiring import access
from rollstream.wiring.adapters import adapted_layers
from rollstream.wiring.trainable import examine_dataset, sample_ruler

__all__ = ["examine", "render_findings"]
SERVER_TIMEOUT_S: Final = 5.0
NUM_CHECKPOINTS: Final = 4  # three that stay and one being written
OPTIMIZER_FACTOR: Final = 4  # weights in float32 and two moments, over weights in bfloat16 at the worst


def examine(config: RunConfig) -> list[Finding]:
    """Return all findings, in the order in which a run would meet them."""
    found: list[Finding] = []
    for check in CHECKS:
        found += check(config)
    return found


def verdict_line(findings: Sequence[Finding], config: RunConfig, config_path: Path) -> str:
    """Return what the findings come to, and what to do next."""
    failed = sum(finding.verdict == "fail" for finding in findings)
    if failed:
        return f"{failed} of {len(findings)} checks failed; change what the arrows say and look again"
    command = "up" if config.b_ratio > 0 else "learn"
    return f"nothing fails; next: rollstream {command} {config_path}"


def examine_data(config: RunConfig) -> Iterator[Finding]:
    """Read both data sets whole: every line, every image's header, every length in tokens [D-3]."""
    try:
        ruler = sample_ruler(config)
    except (RollstreamError, OSError, ValueError):
        ruler = None  # the model's own check says what is wrong with it
    for key, path in (("train", config.data.train_jsonl), ("val", config.data.val_jsonl)):
        if path is None:
            continue
        check = f"data {key}"
        if not Path(path).is_file():
            yield fail(
                check,
                f"no file {path} below {Path.cwd()}",
                f"correct data.{key}_jsonl, or make it: rollstream data import, or rollstream data scenes",
            )
            continue
        try:
            report = examine_dataset(config, path, ruler)
        except DataError as exc:
            yield fail(check, str(exc), "correct those lines, or import the data set again")
            continue
        yield from judge_samples(config, check, report)


def judge_samples(config: RunConfig, check: str, report: SampleReport) -> Iterator[Finding]:
    """Say which samples cannot be used, and whether rollouts can hold the longest list of objects."""
    if report.problems:
        first = "; ".join(str(problem) for problem in report.problems[:3])
        reasons = ", ".join(
            f"{count} x {REASONS[reason]}" for reason, count in count_reasons(report.problems).items()
        )
        found = f"{len(report.problems)} of {report.num_samples} samples cannot be used: {reasons}; {first}"
        remedy = "rollstream data check CONFIG lists all; correct them, or set data.skip_untrainable: true"
        left = report.num_samples - len(report.problems)
        if config.data.skip_untrainable and left:
            yield warn(check, f"{found} (left out)", remedy)
        else:
            yield fail(check, found, remedy)
    elif report.longest is not None:
        found = f"{report.num_samples} samples, the longest {report.longest.total} tokens"
        yield ok(check, found)
    else:
        yield ok(check, f"{report.num_samples} samples, not measured in tokens: the model is not there yet")
    limit = config.rollout_matching.max_new_tokens
    if report.longest_payload > limit:
        yield warn(
            check,
            f"the longest list of objects takes {report.longest_payload} tokens, max_new_tokens is {limit}: "
            "rollouts of such images are always cut off",
            f"set custom.extra.rollout_matching.max_new_tokens to at least {report.longest_payload}",
        )


def examine_model(config: RunConfig) -> Iterator[Finding]:
    """Load what stands beside the weights: tokenizer, coordinate vocabulary, image processor."""
    if config.model.name_or_path is None:
        yield ok("model", "tiny, made from model.config when the run starts")
        return
    try:
        folder = access.model_dir(config)
        prompts = access.prompt_builder(config, folder)
        sample_ruler(config)  # reads the image processor's file, without the libraries that run it
        check_model_folder(folder)
    except (RollstreamError, OSError, ValueError) as exc:
        yield fail("model", str(exc), "correct model.name_or_path, or make a model: rollstream model adapt")
        return
    size = f"{_weights_bytes(folder) / 1e6:.0f} MB"
    yield ok("model", f"{folder}, {size}, {len(prompts.coord_vocab.ids)} coordinate tokens")
    yield judge_join(prompts.tokenizer, prompts.coord_vocab)
    yield from _examine_adapters(config, folder)


def _examine_adapters(config: RunConfig, folder: Path) -> Iterator[Finding]:
    if config.training.lora.rank is None:
        return
    try:
        layers = adapted_layers(config, folder)
    except RollstreamError as exc:
        yield fail("adapters", str(exc), "correct training.lora.targets")
        return
    num_seeing = sum("visual" in name for name in layers)
    rank = config.training.lora.rank
    yield ok("adapters", f"rank {rank} on {len(layers)} layers, {num_seeing} of them vision or merger")


def judge_join(tokenizer: Any, coord_vocab: CoordVocabulary) -> Finding:
    """Say which tokens decide whether an answer goes on, and whether training shows just those [M-7]."""
    remedy = "use a byte-level or byte-fallback tokenizer that keeps <|coord_0|> to <|coord_999|> whole"
    try:
        report = examine_join(tokenizer, coord_vocab)
    except ValueError as exc:
        return fail("tokens at the join", str(exc), remedy)
    if not report.is_exact:
        found = f"{report.describe()}; made whole again, other tokens stand in {report.differing[0]:.120}"
        return warn("tokens at the join", found, remedy)
    return ok("tokens at the join", report.describe())


def examine_disk(config: RunConfig) -> Iterator[Finding]:
    """Compare the free space with what checkpoints and published weights will take."""
    place = access.run_folder(config).path
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    try:
        weights_bytes = _weights_bytes(access.model_dir(config)) if config.model.name_or_path else 0
    except (DataError, ConfigError):
        weights_bytes = 0
    num_policies = config.stage2_async.version_window + 3
    wanted_bytes = weights_bytes * (NUM_CHECKPOINTS * OPTIMIZER_FACTOR + num_policies)
    found = f"{free_bytes / 1e9:.1f} GB free at {place}, about {wanted_bytes / 1e9:.1f} GB will be used"
    if free_bytes < wanted_bytes:
        yield fail("disk", found, "free some, or set run.output_dir to a larger disk")
    elif free_bytes < 2 * wanted_bytes + (1 << 30):
        yield warn("disk", found, "free some: the archive and the logs grow beside the checkpoints")
    else:
        yield ok("disk", found)


def examine_ports(config: RunConfig) -> Iterator[Finding]:
    """Try the ports of the endpoints, unless the run's own stack has them now."""
    ports = {port: str(name) for name, port in metrics_ports(config)}
    if not ports:
        yield warn(
            "ports",
            "no metrics endpoints (metrics.base_port is 0)",
            "set metrics.base_port: 9400 to see the run in Grafana",
        )
        return
    try:
        StackLock.check_free(access.run_folder(config).path)
    except ConfigError:
        yield ok("ports", "in use by this run's own stack, which is running")
        return
    try:
        check_ports_free(config.metrics.host, ports)
    except ConfigError as exc:
        yield fail("ports", str(exc).splitlines()[1].strip(), "set metrics.base_port to another port")
        return
    yield ok("ports", f"{min(ports)} to {max(ports)} on {config.metrics.host} are free")


def examine_gpus(config: RunConfig) -> Iterator[Finding]:
    """Look for the GPUs that are named; that the two sets do not meet is a rule of the configuration."""
    named = sorted({*config.devices.rollout_gpus, *config.devices.learner_gpus})
    if not named:
        yield ok("GPUs", "none named: learner and rollouts on the CPU, or rollouts on servers")
        return
    yield judge_gpus(config, _num_gpus())


def examine_attention(config: RunConfig) -> Iterator[Finding]:
    """Say which attention the learner's packed rows will run, and why."""
    import torch

    from learner.attention import choose_attention

    gpus = config.devices.learner_gpus
    if gpus and _num_gpus() <= max(gpus):
        return  # the GPUs' own check says so
    device = torch.device(f"cuda:{gpus[0]}") if gpus else torch.device("cpu")
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    try:
        choice = choose_attention(config.model.attention, device, dtype)
    except ConfigError as exc:
        yield fail("attention", str(exc), "set model.attention: auto")
        return
    yield ok("attention", f"{choice.kernel}: {choice.why}")


def judge_gpus(config: RunConfig, num_present: int) -> Finding:
    """Compare the GPUs that are named with the number of those that are there."""
    rollout, learner = config.devices.rollout_gpus, config.devices.learner_gpus
    absent = sorted(gpu for gpu in {*rollout, *learner} if gpu >= num_present)
    if absent:
        found = f"{', '.join(map(str, absent))} named, this machine has {num_present}"
        return fail("GPUs", found, "correct devices.rollout_gpus and devices.learner_gpus")
    return ok("GPUs", f"rollouts on {list(rollout)}, learner on {list(learner)} of {num_present}")


def examine_servers(config: RunConfig) -> Iterator[Finding]:
    """Ask every rollout server for its health and size, and try the chunk arithmetic."""
    if config.rollout_matching.rollout_backend != "vllm":
        yield ok("rollout servers", "none wanted, rollouts run in the producers")
        return
    sizes, findings = [], []
    for server in config.rollout_matching.vllm.server.servers:
        size, finding = _ask_server(server.base_url, config.rollout_matching.vllm.sync.mode)
        sizes.append(size)
        findings.append(finding)
    yield from findings
    if all(finding.verdict == "ok" for finding in findings):
        yield judge_chunk(config, sizes)


def _ask_server(base_url: str, sync_mode: str) -> tuple[int, Finding]:
    from broker_schemas.rollout_servers.vllm_http import VllmServer

    check = f"server {base_url}"
    door = VllmServer(base_url, timeout_s=SERVER_TIMEOUT_S)
    try:
        if not door.is_healthy():
            remedy = "start it: rollstream serve vllm CONFIG; or correct vllm.server.servers"
            return 0, fail(check, "does not answer as healthy", remedy)
        if not door.takes_token_ids():
            remedy = "start it with --enable-scale-out, as rollstream serve vllm CONFIG does"
            return 0, fail(check, "takes no token ids", remedy)
        if sync_mode == "transfer" and not door.takes_transfers():
            remedy = "start it again by rollstream serve vllm CONFIG, or set vllm.sync.mode: full"
            return 0, fail(check, "takes no weight transfers", remedy)
        size = door.world_size()
    except RollstreamError as exc:
        return 0, fail(check, str(exc), "start it by rollstream serve vllm CONFIG, which sets what we need")
    finally:
        door.close()
    return size, ok(check, f"healthy, world size {size}")


def judge_chunk(config: RunConfig, server_world_sizes: Sequence[int]) -> Finding:
    """Try the chunk that each learner rank would get of the servers [S-4]."""
    decode, num_ranks = config.rollout_matching.decode_batch_size, config.learner_world_size
    try:
        chunk = chunk_per_rank(decode, server_world_sizes, num_ranks)
    except InfeasibleChunk as exc:
        return fail("rollout chunks", str(exc), "raise decode_batch_size, or add servers")
    return ok("rollout chunks", f"{chunk} rollouts a rank at a time")


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


CHECKS: Final[tuple[Callable[[RunConfig], Sequence[Finding] | Iterator[Finding]], ...]] = (
    examine_data,
    examine_model,
    examine_broker,
    examine_disk,
    examine_ports,
    examine_gpus,
    examine_attention,
    examine_servers,
)
