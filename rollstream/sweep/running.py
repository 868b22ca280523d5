"""Runs a grid for real, one stack after the other, and goes on where an earlier call was stopped [O-7].

A cell is done when its summary file is there; the page and the list of numbers are written after every cell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console

import rollstream
from broker_schemas.errors import ConfigError
from configs import RunConfig, load_config
from configs.show import resolved_yaml
from rollstream.evaluation.evaluating import evaluate_run
from rollstream.history.auditing import audit_run
from rollstream.models.run_model import make_described_model
from rollstream.run_folder import RunFolder, latest_steps, read_json_lines, read_json_map
from rollstream.show.report.counting import number
from rollstream.stack.running import StackOptions, run_stack
from rollstream.staged_folder import write_atomically
from rollstream.sweep.grid import Cell, Grid, parse_grid, run_name, slug
from rollstream.sweep.numbers import CellNumbers, cell_numbers
from rollstream.sweep.report import Sweep, render_sweep_page
from rollstream.wiring import access

SHIPPED_GRID: Final = Path(rollstream.__file__).parent / "assets" / "sweep_grid.yaml"
SIGNALLED: Final = 128
STOPPED_STATUS: Final = 3
_INPUT_KEYS: Final = ("model.", "data.")


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What the command line says. ``output_dir`` None: ``sweep-<run.name>`` beside the runs.

    ``steps`` None leaves the configuration's number; ``overrides`` hold for every cell, below its own.
    """

    grid_path: Path = SHIPPED_GRID
    steps: int | None = None
    output_dir: Path | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """What there is now, and the exit status: 0, 3 when a cell failed, 128 + n after signal n."""

    sweep: Sweep
    page: Path
    exit_status: int = 0
    num_run: int = 0


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One cell that can be run: its overrides, and the configuration that they give."""

    cell: Cell
    overrides: tuple[str, ...]
    config: RunConfig
    summary: Path

    @property
    def folder(self) -> RunFolder:
        return access.run_folder(self.config)


def run_sweep(config_path: Path, options: SweepOptions, console: Console) -> SweepOutcome:
    """Run every cell that is not done yet and return all numbers; the console sees the stacks.

    Raises ConfigError before anything is started for a cell that no configuration allows, and for an output
    folder that holds cells of other settings. A cell that fails is told and left for the next call.
    """
    return _RunningSweep.plan(config_path, options, console).run()


@dataclass
class _RunningSweep:
    """A planned sweep and what is known of it."""

    config_path: Path
    base: RunConfig
    output_dir: Path
    grid: Grid
    plans: tuple[_Plan, ...]
    console: Console
    numbers: dict[str, CellNumbers]
    failures: dict[str, str] = field(default_factory=dict)
    start_f1: float | None = None
    num_run: int = 0

    @classmethod
    def plan(cls, config_path: Path, options: SweepOptions, console: Console) -> _RunningSweep:
        """Read grid and folder; nothing is started or written."""
        where = str(options.grid_path)
        try:
            grid = parse_grid(options.grid_path.read_text(encoding="utf-8"), where)
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"grid {where}: not readable: {exc}; give a YAML file with --grid") from exc
        given = options.overrides
        if options.steps is not None:
            given = (*given, f"training.max_steps={options.steps}")
        base = load_config(config_path, given)
        output_dir = options.output_dir or Path(base.run.output_dir) / f"sweep-{base.run.name}"
        plans = tuple(_plan(config_path, given, output_dir, cell) for cell in grid.cells)
        numbers = {plan.cell.name: found for plan in plans if (found := _finished(plan)) is not None}
        return cls(config_path, base, output_dir, grid, plans, console, numbers)

    def run(self) -> SweepOutcome:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        due = [plan for plan in self.plans if plan.cell.name not in self.numbers]
        self.start_f1 = self._evaluate_start()
        status = 0
        for plan in due:
            place = f"cell {self.plans.index(plan) + 1} of {len(self.plans)}"
            self.console.print(f"{place}: {plan.cell.name} in {plan.folder.path}", markup=False)
            status = self._run_cell(plan)
            self._write()
            if status > SIGNALLED:
                break
        if status <= SIGNALLED:
            status = STOPPED_STATUS if self.failures else 0
        page = self._write()
        return SweepOutcome(sweep=self._sweep(), page=page, exit_status=status, num_run=self.num_run)

    def _run_cell(self, plan: _Plan) -> int:
        """Train, evaluate and audit one cell and write its summary; return the stack's exit status."""
        make_described_model(plan.config)
        result = run_stack(
            self.config_path, plan.config, StackOptions(overrides=plan.overrides, console=self.console)
        )
        if result.exit_status:
            self.failures[plan.cell.name] = result.reason
            self.console.print(f"{plan.cell.name}: {result.reason}", markup=False)
            return result.exit_status
        found: Mapping[str, float] = {}
        if plan.config.data.val_jsonl is not None:
            found = evaluate_run(plan.config, model=None, label="after", num_samples=None).metrics
        audit = audit_run(plan.folder.path).to_json()
        write_atomically(plan.folder.audit, json.dumps(audit, indent=1))
        steps = latest_steps(read_json_lines(plan.folder.train_log))
        samples = read_json_lines(plan.folder.stack_samples)
        numbers = cell_numbers(steps, samples, audit, f1=number(found, "eval_rollout_f1"))
        plan.summary.parent.mkdir(exist_ok=True)
        write_atomically(plan.summary, json.dumps(_summary(plan, numbers), indent=1) + "\n")
        self.numbers[plan.cell.name] = numbers
        self.num_run += 1
        return 0

    def _evaluate_start(self) -> float | None:
        """Return the start model's F1, measured once; None where cells differ in model or data."""
        changed = [key for cell in self.grid.cells for key, _ in (*cell.fixed, *cell.values)]
        if self.base.data.val_jsonl is None or any(key.startswith(_INPUT_KEYS) for key in changed):
            return None
        path = self.output_dir / "start.json"
        known = read_json_map(path)
        if known is None:
            model = access.model_dir(self.base) if self.base.model.config is None else None
            if model is None:
                return None
            self.console.print(f"evaluating the start model {model}", markup=False)
            known = dict(evaluate_run(self.base, model=model, label=None, num_samples=None).metrics)
            write_atomically(path, json.dumps(known, indent=1) + "\n")
        return number(known, "eval_rollout_f1")

    def _sweep(self) -> Sweep:
        return Sweep(
            name=self.output_dir.name,
            steps=self.base.training.max_steps,
            grid=self.grid,
            numbers=self.numbers,
            failures=self.failures,
            start_f1=self.start_f1,
        )

    def _write(self) -> Path:
        """Write the page and the numbers as far as they are known; return the page."""
        sweep, page = self._sweep(), self.output_dir / "sweep.html"
        write_atomically(page, render_sweep_page(sweep))
        write_atomically(self.output_dir / "sweep.json", json.dumps(sweep_json(sweep), indent=1) + "\n")
        return page


def sweep_json(sweep: Sweep) -> dict[str, Any]:
    """Return a sweep as one map: a list of cells with their settings, state and numbers."""
    cells = [
        {
            "block": block.title,
            "cell": cell.name,
            "settings": dict((*cell.fixed, *cell.values)),
            "state": "done" if cell.name in sweep.numbers else sweep.state_of(cell),
            "numbers": sweep.numbers[cell.name].to_json() if cell.name in sweep.numbers else None,
        }
        for block in sweep.grid.blocks
        for cell in block.cells
    ]
    return {"name": sweep.name, "max_steps": sweep.steps, "start_f1": sweep.start_f1, "cells": cells}


def _plan(config_path: Path, given: tuple[str, ...], output_dir: Path, cell: Cell) -> _Plan:
    name = run_name(slug(output_dir.resolve().name), cell)
    overrides = (*given, *cell.overrides, f"run.output_dir={output_dir}", f"run.name={name}")
    try:
        config = load_config(config_path, overrides)
    except ConfigError as exc:
        raise ConfigError(f"cell {cell.name}: {exc}") from exc
    plan = _Plan(
        cell=cell, overrides=overrides, config=config, summary=output_dir / "cells" / f"{cell.name}.json"
    )
    _check_same_settings(plan)
    return plan


def _check_same_settings(plan: _Plan) -> None:
    """Refuse to go on with a run that was begun with other settings: its numbers would belong to neither."""
    begun = plan.folder.resolved_config
    if begun.exists() and begun.read_text(encoding="utf-8") != resolved_yaml(plan.config):
        raise ConfigError(
            f"cell {plan.cell.name}: {begun} holds other settings than this sweep gives it; "
            "go on with the configuration, grid and steps it was begun with, or give another --output"
        )


def _finished(plan: _Plan) -> CellNumbers | None:
    """Return the numbers of a finished cell; raises ConfigError when it was finished with other settings."""
    summary: Mapping[str, Any] | None = read_json_map(plan.summary)
    if summary is None:
        return None
    if summary.get("settings_digest") != _digest(plan):
        raise ConfigError(
            f"cell {plan.cell.name}: {plan.summary} was measured with other settings; "
            "delete it to measure again, or give another --output"
        )
    numbers = summary.get("numbers")
    return CellNumbers.from_json(numbers if isinstance(numbers, Mapping) else {})


def _summary(plan: _Plan, numbers: CellNumbers) -> dict[str, Any]:
    return {
        "cell": plan.cell.name,
        "run": str(plan.folder.path),
        "overrides": list(plan.overrides),
        "settings_digest": _digest(plan),
        "numbers": numbers.to_json(),
    }


def _digest(plan: _Plan) -> str:
    return hashlib.sha256(resolved_yaml(plan.config).encode()).hexdigest()
