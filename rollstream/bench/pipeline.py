"""The budgets of the whole pipeline: learner idle share, and steps a second against the same work on policy.

Two real stacks of the same configuration, one after the other: `stage2_ab_training`, where every B step waits
for its own rollouts, and `stage2_async`, where they are made meanwhile. All figures are ratios of this run.
A packed B step holds about as many rollouts as one on policy, so speed is counted in tokens trained.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.table import Table

import configs
from broker_schemas.errors import RunStopped
from configs import load_config
from rollstream.datasets.scenes import make_scenes
from rollstream.models.shipped import SHIPPED_MODEL
from rollstream.run_folder import RunFolder, latest_steps, read_json_lines
from rollstream.stack.running import StackOptions, run_stack

FOLDER: Final = Path(configs.__file__).parent
LARGEST_IDLE_SHARE: Final = 0.05
LEAST_SPEED_OF_IDEAL: Final = 0.9
WARM_UP_SHARE: Final = 0.25
SHARED: Final = (
    f"model.name_or_path={SHIPPED_MODEL}",
    "devices.learner_world_size=1",
    "training.effective_batch_size=16",
    # two packs of 1024 tokens hold the 16 or so rollouts that a step on policy has
    "training.per_device_train_batch_size=8",
    "training.save_every_steps=0",
    "stage2_ab.schedule.b_ratio=0.5",
    "custom.extra.rollout_matching.decode_batch_size=16",
    "producers.request_size=16",
)


@dataclass(frozen=True, kw_only=True)
class PipelineTimes:
    """What one stack did after its warm-up, each a step: medians of A and of B steps, in their shares."""

    num_steps: int
    num_b_steps: int
    step_s: float
    wait_s: float
    busy_s: float
    num_tokens: float

    @property
    def idle_share(self) -> float:
        return self.wait_s / (self.wait_s + self.busy_s)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.step_s


@dataclass(frozen=True, kw_only=True)
class PipelineBenchReport:
    """Both runs and their ratios. ``ideal_speedup`` = (generate + train) / max(generate, train)."""

    on_policy: PipelineTimes
    overlapped: PipelineTimes
    num_skipped: int

    @property
    def ideal_speedup(self) -> float:
        generate_s, train_s = self.on_policy.wait_s, self.on_policy.busy_s
        return (generate_s + train_s) / max(generate_s, train_s)

    @property
    def speedup(self) -> float:
        return self.overlapped.tokens_per_s / self.on_policy.tokens_per_s

    @property
    def speed_of_ideal(self) -> float:
        return self.speedup / self.ideal_speedup

    @property
    def slowdown(self) -> float:
        """How much longer the learner computes on a token while rollouts are made beside it; 1 = no longer.

        It says what processes that share caches and memory take from each other: with cores of their own
        the ideal assumes 1.
        """
        alone = self.on_policy.busy_s / self.on_policy.num_tokens
        return self.overlapped.busy_s / self.overlapped.num_tokens / alone

    @property
    def is_within_budget(self) -> bool:
        fast = self.speed_of_ideal >= LEAST_SPEED_OF_IDEAL
        return fast and self.overlapped.idle_share <= LARGEST_IDLE_SHARE

    def to_json(self) -> dict[str, Any]:
        return {
            "on_policy": asdict(self.on_policy),
            "overlapped": asdict(self.overlapped),
            "b_steps_skipped_due_to_queue": self.num_skipped,
            "idle_share": self.overlapped.idle_share,
            "speedup": self.speedup,
            "ideal_speedup": self.ideal_speedup,
            "speed_of_ideal": self.speed_of_ideal,
            "slowdown": self.slowdown,
        }

    def render(self) -> RenderableType:
        times = Table(title="seconds a step", title_justify="left")
        for column in ("run", "steps", "B", "step", "waiting", "busy", "tokens"):
            times.add_column(column, justify="right")
        for name, run in (("on policy", self.on_policy), ("stage2_async", self.overlapped)):
            cells = (f"{value:.3f}" for value in (run.step_s, run.wait_s, run.busy_s))
            times.add_row(name, str(run.num_steps), str(run.num_b_steps), *cells, f"{run.num_tokens:,.0f}")
        ratios = Table(title="budgets", title_justify="left")
        for column in ("what", "measured", "budget"):
            ratios.add_column(column)
        ratios.add_row("learner idle share", f"{self.overlapped.idle_share:.3f}", f"<= {LARGEST_IDLE_SHARE}")
        ratios.add_row(
            f"tokens trained a second of the ideal ({self.speedup:.2f}x of {self.ideal_speedup:.2f}x)",
            f"{self.speed_of_ideal:.3f}",
            f">= {LEAST_SPEED_OF_IDEAL}",
        )
        shared = f"computing on a token takes {self.slowdown:.2f}x as long while rollouts are made beside it"
        return Group(times, ratios, shared, f"B steps skipped due to the queue: {self.num_skipped}")


def run_pipeline_bench(seed: int = 0, quick: bool = False) -> PipelineBenchReport:
    """Run both stacks and return their report; ``quick`` runs few steps and measures little.

    Raises RunStopped when a stack does not end well.
    """
    steps = 12 if quick else 48
    with tempfile.TemporaryDirectory(prefix="rollstream-bench-") as folder:
        scenes = Path(folder) / "scenes"
        make_scenes(scenes, num_train=256, num_val=8, seed=seed)
        inputs = (
            *SHARED,
            f"data.train_jsonl={scenes / 'train.jsonl'}",
            f"data.val_jsonl={scenes / 'val.jsonl'}",
            f"run.output_dir={folder}",
            f"run.seed={seed}",
            f"training.max_steps={steps}",
        )
        on_policy = _run(FOLDER / "stage2_ab" / "step_budgeted.yaml", "on-policy", inputs)
        queued = (
            *inputs,
            "stage2_async.queue_limit=16",
            "stage2_async.prefetch_target_packs=8",
            "stage2_async.sync_every_steps=4",
        )
        overlapped = _run(FOLDER / "stage2_async" / "local.yaml", "async", queued)
    return PipelineBenchReport(
        on_policy=times_of(on_policy),
        overlapped=times_of(overlapped),
        num_skipped=sum(row["reason"] == "queue_short" for row in _measured(overlapped)),
    )


def _run(path: Path, name: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    given = (*overrides, f"run.name={name}")
    config = load_config(path, given)
    options = StackOptions(overrides=given, live=False, console=Console(quiet=True))
    result = run_stack(path, config, options)
    if result.exit_status:
        raise RunStopped(f"bench pipeline: the stack {name} ended with {result.exit_status}: {result.reason}")
    folder = RunFolder(Path(config.run.output_dir) / name)
    return latest_steps(read_json_lines(folder.train_log))


def _measured(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the rows after the warm-up, a whole number of A/B pairs."""
    start = int(len(rows) * WARM_UP_SHARE) // 2 * 2
    return rows[start:]


def times_of(rows: Sequence[Mapping[str, Any]]) -> PipelineTimes:
    """Return the times of a step over the measured rows of a training log.

    Medians, since a machine that is shared with others stands still now and then.
    """
    kept = _measured(rows)
    kinds = Counter(str(row["kind"]) for row in kept)

    def typical(key: str) -> float:
        by_kind = {kind: median(float(row[key]) for row in kept if row["kind"] == kind) for kind in kinds}
        return sum(by_kind[kind] * count for kind, count in kinds.items()) / len(kept)

    return PipelineTimes(
        num_steps=len(kept),
        num_b_steps=kinds["B"],
        step_s=typical("step_s"),
        wait_s=typical("wait_s"),
        busy_s=typical("busy_s"),
        num_tokens=mean(float(row["num_tokens"]) for row in kept),
    )
