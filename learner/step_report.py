"""What is reported of one optimizer step: each rank's part, the
sum over ranks, and the row of the training log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from broker_schemas.records.packs import StepClaim, Untrainable
from learner.step_costs import ModelWork
from learner.step_rows import LoadedRow
from learner.train_step import LossSums, StepUpdate

LogRow = dict[str, float | int | str]


@dataclass
class RankPart:
    """One rank's part of a step, gathered while it runs and told to all ranks as JSON.

    ``busy_s``: computing; ``wait_s``: waiting for the decision and for rows; ``broken``: segments that
    cannot be trained. ``peak_memory_bytes``: of each rank.
    """

    sums: LossSums = field(default_factory=LossSums)
    counters: Counter[str] = field(default_factory=Counter)
    lags: list[int] = field(default_factory=list)
    fills: list[float] = field(default_factory=list)
    busy_s: float = 0.0
    wait_s: float = 0.0
    peak_memory_bytes: list[int] = field(default_factory=list)
    is_stop_requested: bool = False
    broken: list[Untrainable] = field(default_factory=list)

    def note_row(self, loaded: LoadedRow) -> None:
        """Count a row that is about to be trained."""
        self.counters.update(loaded.counters)
        self.lags.extend(loaded.lags)
        self.fills.append(loaded.fill)

    def to_body(self) -> dict[str, Any]:
        broken = [asdict(item) for item in self.broken]
        return {
            **vars(self), "sums": asdict(self.sums), "counters": dict(self.counters), "broken": broken
        }  # fmt: skip

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> RankPart:
        return cls(
            **{
                **body,
                "sums": LossSums(**body["sums"]),
                "counters": Counter(body["counters"]),
                "broken": [Untrainable(**item) for item in body["broken"]],
            },
        )


def join_parts(parts: Sequence[RankPart]) -> RankPart:
    """Return the step over all ranks, in rank order; times are means over the ranks."""
    joined = RankPart()
    for part in parts:
        joined.sums = joined.sums + part.sums
        joined.counters.update(part.counters)
        joined.lags.extend(part.lags)
        joined.fills.extend(part.fills)
        joined.busy_s += part.busy_s / len(parts)
        joined.wait_s += part.wait_s / len(parts)
        joined.broken += part.broken
        joined.peak_memory_bytes += part.peak_memory_bytes
        joined.is_stop_requested = joined.is_stop_requested or part.is_stop_requested
    return joined


def cost_columns(
    joined: RankPart, work: ModelWork, *, step_s: float, peak_flops_per_s: float | None
) -> LogRow:
    """Return what a step cost: tokens and operations a second over all ranks, peak memory by rank [L-11].

    ``model_flops_utilisation`` is there where the devices' peak, ``peak_flops_per_s`` of one, is known.
    """
    sums, peaks = joined.sums, joined.peak_memory_bytes
    flops_per_s = work.flops(sums.num_tokens, sums.num_patches, sums.num_supervised) / max(step_s, 1e-9)
    columns: LogRow = {
        "tokens_per_s": sums.num_tokens / max(step_s, 1e-9),
        "model_tflops_per_s": flops_per_s / 1e12,
    }
    if peak_flops_per_s is not None:
        columns["model_flops_utilisation"] = flops_per_s / (len(peaks) * peak_flops_per_s)
    return columns | {f"memory/peak_gb_{rank}": peak / 1e9 for rank, peak in enumerate(peaks)}


def log_row(claim: StepClaim, joined: RankPart, update: StepUpdate, *, step_s: float, time_ms: int) -> LogRow:
    """Return the training log's row of a step: one flat map; P-11 and M-12 names for B steps only [M-13]."""
    sums = joined.sums
    row: LogRow = {
        "optimizer_step": claim.optimizer_step,
        "kind": claim.kind,
        "reason": claim.reason,
        "loss": sums.mean("total"),
        "loss_ce": sums.mean("ce"),
        "loss_coord": sums.mean("slot"),
        "loss_coord_soft_ce": sums.mean("soft_ce"),
        "loss_coord_w1": sums.mean("w1"),
        "loss_coord_gate": sums.mean("gate"),
        "loss_duplicates": sums.mean("repeat"),
        "loss_coord_prefix": sums.prefix_mean,
        "loss_coord_tail": sums.tail_mean,
        "grad_norm": update.grad_norm,
        "learning_rate": update.learning_rate,
        "num_segments": sums.num_segments,
        "num_tokens": sums.num_tokens,
        "num_packs": sums.num_rows,
        "policy_version": claim.policy_version,
        "lag_claimed_mean": sum(joined.lags) / len(joined.lags) if joined.lags else 0.0,
        "lag_claimed_max": max(joined.lags, default=0),
        "fill": sum(joined.fills) / len(joined.fills) if joined.fills else 0.0,
        "wait_s": joined.wait_s,
        "busy_s": joined.busy_s,
        "step_s": step_s,
        "time_ms": time_ms,
    }
    if claim.kind == "B":
        row["packing/post_rollout_fill"] = row["fill"]
        row["packing/post_rollout_segments"] = sums.num_segments / max(sums.num_rows, 1)
        row["packing/post_rollout_selected_total_len"] = sums.num_tokens / max(sums.num_rows, 1)
        counters = joined.counters
        row |= {f"rollout/{name}": count for name, count in sorted(counters.items())}
        row["rollout/match_rate"] = counters["matched"] / max(counters["ground_truth_objects"], 1)
        row["rollout/truncated_share"] = counters["truncated"] / max(counters["rollouts"], 1)
    return row
