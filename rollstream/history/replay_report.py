"""Compares a replay with the run it came from: equal to the bit, or how an experiment differs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table

from rollstream.run_folder import Row, latest_steps, read_json_lines

COMPARED: Final = ("loss", "loss_ce", "loss_coord", "grad_norm")
SHOWN_STEPS: Final = 20


@dataclass(frozen=True, kw_only=True)
class ComparedStep:
    """One optimizer step of both; ``difference`` is the largest over the compared values, NaN is infinite."""

    optimizer_step: int
    kind: str
    loss: float
    replayed_loss: float
    difference: float
    num_packs: int
    replayed_num_packs: int


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """What a replay gave. ``changes`` is empty where it must be equal to the bit.

    ``first_differing_step`` is -1 for none. ``weights_equal`` is None where the run has no checkpoint of the
    last replayed step to compare with.
    """

    folder: str
    changes: tuple[str, ...]
    steps: tuple[ComparedStep, ...]
    weights_equal: bool | None

    @property
    def first_differing_step(self) -> int:
        return next((step.optimizer_step for step in self.steps if step.difference), -1)

    @property
    def max_abs_difference(self) -> float:
        return max((step.difference for step in self.steps), default=0.0)

    @property
    def is_equal(self) -> bool:
        return self.first_differing_step < 0 and self.weights_equal is not False

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts and lists."""
        return {
            **asdict(self),
            "is_equal": self.is_equal,
            "first_differing_step": self.first_differing_step,
            "max_abs_difference": self.max_abs_difference,
        }

    def render(self) -> RenderableType:
        """Return the verdict, and the steps that differ."""
        return Group(*_verdict(self), *([_steps_table(self)] if self.first_differing_step >= 0 else []))


def compare_logs(original: Path, replayed: Path, *, first: int, end: int) -> tuple[ComparedStep, ...]:
    """Return steps ``first`` to ``end`` (without it) of both training logs, by their last row of each step.

    A step that one of them lacks differs by infinity.
    """
    ours = {row["optimizer_step"]: row for row in _step_rows(replayed)}
    theirs = {row["optimizer_step"]: row for row in _step_rows(original)}
    return tuple(_compared(step, theirs.get(step, {}), ours.get(step, {})) for step in range(first, end))


def _step_rows(path: Path) -> list[Row]:
    return latest_steps([row for row in read_json_lines(path) if row.get("kind") in ("A", "B")])


def _compared(optimizer_step: int, original: Row, replayed: Row) -> ComparedStep:
    differences = [_difference(original.get(name), replayed.get(name)) for name in COMPARED]
    return ComparedStep(
        optimizer_step=optimizer_step,
        kind=str(original.get("kind", "?")),
        loss=float(original.get("loss", math.nan)),
        replayed_loss=float(replayed.get("loss", math.nan)),
        difference=max(differences),
        num_packs=int(original.get("num_packs", 0)),
        replayed_num_packs=int(replayed.get("num_packs", 0)),
    )


def _difference(one: Any, other: Any) -> float:
    if one is None or other is None:
        return math.inf
    difference = abs(float(one) - float(other))
    return math.inf if math.isnan(difference) else difference


def weights_equal(original: Path, replayed: Path) -> bool | None:
    """Say whether two checkpoints hold the same weights to the bit; None where one is missing."""
    files = [sorted(folder.glob("model*.safetensors")) for folder in (original, replayed)]
    if not all(files):
        return None
    ours, theirs = (_tensor_bytes(group) for group in files)
    return ours == theirs


def _tensor_bytes(files: Sequence[Path]) -> dict[str, bytes]:
    from safetensors import safe_open

    found = {}
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                tensor = tensors.get_tensor(name).contiguous()
                found[name] = bytes(tensor.view(-1).view(_byte_type()).numpy().tobytes())
    return found


def _byte_type() -> Any:
    import torch

    return torch.uint8


def _verdict(report: ReplayReport) -> list[str]:
    num = len(report.steps)
    lines = [f"replayed {num} optimizer steps into {report.folder}"]
    weights = {True: "equal to the bit", False: "different", None: "no checkpoint to compare with"}
    if report.changes:
        lines.append(f"experiment: {', '.join(report.changes)}; the same segments in every step")
        means = [
            sum(getattr(step, name) for step in report.steps) / num for name in ("loss", "replayed_loss")
        ]
        lines.append(f"mean loss {means[0]:.6f} then, {means[1]:.6f} now")
        packs = [
            sum(getattr(step, name) for step in report.steps) for name in ("num_packs", "replayed_num_packs")
        ]
        lines.append(f"packs {packs[0]} then, {packs[1]} now")
    if report.is_equal:
        lines.append(
            f"every loss and gradient norm equal to the bit; last weights: {weights[report.weights_equal]}"
        )
    else:
        lines.append(
            f"first differing step {report.first_differing_step}, "
            f"largest difference {report.max_abs_difference:.3g}; "
            f"last weights: {weights[report.weights_equal]}"
        )
    return lines


def _steps_table(report: ReplayReport) -> Table:
    differing = [step for step in report.steps if step.difference]
    table = Table(
        title=f"steps that differ ({len(differing)}), the first {SHOWN_STEPS}", title_justify="left"
    )
    for column in ("step", "kind", "loss then", "loss now", "largest difference", "packs then", "packs now"):
        table.add_column(column, justify="right")
    for step in differing[:SHOWN_STEPS]:
        table.add_row(
            str(step.optimizer_step),
            step.kind,
            f"{step.loss:.6f}",
            f"{step.replayed_loss:.6f}",
            f"{step.difference:.3g}",
            str(step.num_packs),
            str(step.replayed_num_packs),
        )
    return table
