"""`rollstream bench learning`: whether rollouts make a model better than the same training without them.

From one checkpoint, channel A alone against A/B, with equal optimizer steps and with equal tokens, over
several seeds; every run is a stack of its own, one after the other. A run is done when its result file is
there: an interrupted bench goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console

import configs
from broker_schemas.errors import ConfigError
from broker_schemas.method.model_fingerprint import model_fingerprint
from configs import RunConfig, load_config
from configs.show import resolved_yaml
from rollstream.bench.learning_arms import ALONE, B_RATIO, MIXED, Cell, arms_of, cells_of, steps_for_tokens
from rollstream.bench.learning_numbers import CellResult, cell_result, kept_numbers
from rollstream.bench.learning_report import LearningBench, learning_json, render_learning_page
from rollstream.datasets.scenes import make_scenes
from rollstream.evaluation.evaluating import evaluate_run
from rollstream.models.run_model import make_described_model
from rollstream.models.shipped import SHIPPED_MODEL
from rollstream.run_folder import RunFolder, latest_steps, read_json_lines, read_json_map
from rollstream.stack.running import StackOptions, run_stack
from rollstream.staged_folder import write_atomically
from rollstream.wiring import access

SHIPPED_CONFIG: Final = Path(configs.__file__).parent / "demo.yaml"
SIGNALLED: Final = 128
STOPPED_STATUS: Final = 3


@dataclass(frozen=True, kw_only=True)
class LearningOptions:
    """What the command line says. ``config_path`` None: the demo's, with scenes of its own.

    ``steps`` None leaves the configuration's number. ``varied``: values by the names of
    ``learning_arms.VARIED``. ``output_dir`` None: ``learning-<run.name>`` beside the runs.
    """

    config_path: Path | None = None
    steps: int | None = None
    num_seeds: int = 3
    varied: Mapping[str, Sequence[str]] = field(default_factory=dict)
    output_dir: Path | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LearningOutcome:
    """What there is now, and the exit status: 0, 3 when a run failed, 128 + n after signal n."""

    bench: LearningBench
    page: Path
    exit_status: int = 0
    num_run: int = 0


def run_learning_bench(options: LearningOptions, console: Console) -> LearningOutcome:
    """Run every cell that is not done yet and return all numbers; the console sees the stacks.

    Raises ConfigError before anything is started for settings that no configuration allows, and for a folder
    that holds runs of other settings. A run that fails is told and left for the next call.
    """
    return _RunningBench.plan(options, console).run()


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One run: ``overrides``, the configuration that they give, and those it is evaluated with."""

    cell: Cell
    overrides: tuple[str, ...]
    config: RunConfig
    judged_with: tuple[str, ...]
    result_file: Path

    @property
    def folder(self) -> RunFolder:
        return access.run_folder(self.config)

    @property
    def digest(self) -> str:
        return hashlib.sha256(resolved_yaml(self.config).encode()).hexdigest()


@dataclass
class _RunningBench:
    """A planned bench and what is known of it."""

    config_path: Path
    base: RunConfig
    given: tuple[str, ...]
    output_dir: Path
    cells: tuple[Cell, ...]
    console: Console
    plans: dict[str, _Plan] = field(default_factory=dict)
    results: dict[str, CellResult] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    start: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def plan(cls, options: LearningOptions, console: Console) -> _RunningBench:
        """Read configuration and folder; every setting is checked before a run is started."""
        arms = arms_of(options.varied)
        path, given = _inputs(options, console)
        base = load_config(path, given)
        _check_base(base, path)
        output_dir = _output_dir(options, base)
        bench = cls(
            config_path=path,
            base=base,
            given=given,
            output_dir=output_dir,
            cells=cells_of(arms, base.run.seed, options.num_seeds),
            console=console,
        )
        for cell in bench.cells:
            # the length of an equal-tokens run is not known before the runs it is compared with
            plan = bench.plan_of(cell)
            if plan is not None and (found := _finished(plan)) is not None:
                bench.results[cell.name] = found
        return bench

    def run(self) -> LearningOutcome:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.start = self._evaluate_start()
        status, num_run = 0, 0
        for index, cell in enumerate(self.cells):
            plan = None if cell.name in self.results else self.plan_of(cell)
            if plan is None:
                continue
            place = f"run {index + 1} of {len(self.cells)}: {cell.arm.title}, seed {cell.seed}"
            self.console.print(
                f"{place}, {plan.config.training.max_steps} steps in {plan.folder.path}", markup=False
            )
            status = self._run_cell(plan)
            num_run += status == 0
            self._write()
            if status > SIGNALLED:
                break
        if status <= SIGNALLED:
            status = STOPPED_STATUS if self.failures else 0
        return LearningOutcome(bench=self._bench(), page=self._write(), exit_status=status, num_run=num_run)

    def plan_of(self, cell: Cell) -> _Plan | None:
        """Return how a cell is run; None for equal tokens while the runs that tell them are not done."""
        if cell.name in self.plans:
            return self.plans[cell.name]
        length: tuple[str, ...] = ()
        if cell.arm.has_equal_tokens:
            pair = [self.results.get(Cell(arm=arm, seed=cell.seed).name) for arm in (ALONE, MIXED)]
            alone, mixed = pair
            if alone is None or mixed is None:
                return None
            steps = steps_for_tokens(alone.num_steps, alone.num_tokens, mixed.num_tokens)
            length = (f"training.max_steps={steps}",)
        name = cell.run_name(self.output_dir.resolve().name)
        own = (f"run.seed={cell.seed}", f"run.output_dir={self.output_dir}", f"run.name={name}")
        overrides = (*self.given, *cell.arm.overrides, *length, *own)
        try:
            config = load_config(self.config_path, overrides)
        except ConfigError as exc:
            raise ConfigError(f"bench learning, {cell.arm.title}: {exc}") from exc
        plan = _Plan(
            cell=cell,
            overrides=overrides,
            config=config,
            judged_with=(*self.given, *own),
            result_file=self.output_dir / "cells" / f"{cell.name}.json",
        )
        _check_same_settings(plan)
        self.plans[cell.name] = plan
        return plan

    def _run_cell(self, plan: _Plan) -> int:
        """Train and evaluate one cell and write its result; return the stack's exit status."""
        make_described_model(plan.config)
        options = StackOptions(overrides=plan.overrides, console=self.console)
        outcome = run_stack(self.config_path, plan.config, options)
        if outcome.exit_status:
            self.failures[plan.cell.name] = outcome.reason
            self.console.print(f"{plan.cell.name}: {outcome.reason}", markup=False)
            return outcome.exit_status
        # with another gate of its own a run would be judged more kindly than those it is compared with
        judged = load_config(self.config_path, plan.judged_with)
        metrics = evaluate_run(judged, model=None, label="after", num_samples=None).metrics
        result = cell_result(latest_steps(read_json_lines(plan.folder.train_log)), metrics)
        plan.result_file.parent.mkdir(exist_ok=True)
        kept = {"cell": plan.cell.name, "run": str(plan.folder.path), "overrides": list(plan.overrides)}
        written = {**kept, "settings_digest": plan.digest, "result": result.to_json()}
        write_atomically(plan.result_file, json.dumps(written, indent=1) + "\n")
        self.results[plan.cell.name] = result
        return 0

    def _evaluate_start(self) -> Mapping[str, float]:
        """Return the numbers of the checkpoint, measured once; refuses to go on from another one."""
        path = self.output_dir / "start.json"
        make_described_model(self.base)
        model = access.model_dir(self.base)
        fingerprint = model_fingerprint(model)
        known = read_json_map(path)
        if known is None:
            self.console.print(f"evaluating the checkpoint {model}", markup=False)
            found = evaluate_run(self.base, model=model, label=None, num_samples=None).metrics
            known = {"model": str(model), "fingerprint": fingerprint, "numbers": kept_numbers(found)}
            write_atomically(path, json.dumps(known, indent=1) + "\n")
        if known.get("fingerprint") != fingerprint:
            raise ConfigError(
                f"bench learning: {path}: its runs began from another checkpoint than {model} holds now; "
                "give another --output, or put the old checkpoint back"
            )
        return {str(name): float(value) for name, value in known["numbers"].items()}

    def _bench(self) -> LearningBench:
        return LearningBench(
            name=self.output_dir.name,
            steps=self.base.training.max_steps,
            gate=self.base.rollout_matching.maskiou_gate,
            arms=tuple(dict.fromkeys(cell.arm for cell in self.cells)),
            cells=self.cells,
            results=self.results,
            failures=self.failures,
            start=self.start,
        )

    def _write(self) -> Path:
        """Write the page and the numbers as far as they are known; return the page."""
        bench, page = self._bench(), self.output_dir / "learning.html"
        write_atomically(page, render_learning_page(bench))
        write_atomically(self.output_dir / "learning.json", json.dumps(learning_json(bench), indent=1) + "\n")
        return page


def _inputs(options: LearningOptions, console: Console) -> tuple[Path, tuple[str, ...]]:
    """Return the configuration file and the overrides of every run; makes the scenes where none is given."""
    given = options.overrides
    if options.steps is not None:
        given = (*given, f"training.max_steps={options.steps}")
    if options.config_path is not None:
        return options.config_path, given
    output_dir = _output_dir(options, load_config(SHIPPED_CONFIG, given))
    scenes = output_dir / "scenes"
    if not scenes.exists():
        console.print(f"drawing scenes in {scenes}", markup=False)
        make_scenes(scenes)
    own = (
        f"model.name_or_path={SHIPPED_MODEL}",
        f"data.train_jsonl={scenes / 'train.jsonl'}",
        f"data.val_jsonl={scenes / 'val.jsonl'}",
    )
    return SHIPPED_CONFIG, (*own, *given)


def _output_dir(options: LearningOptions, base: RunConfig) -> Path:
    return options.output_dir or Path(base.run.output_dir) / f"learning-{base.run.name}"


def _check_base(base: RunConfig, path: Path) -> None:
    """Refuse what cannot be compared."""
    if base.stage2_ab.schedule.b_ratio is None or base.b_ratio == 0:
        raise ConfigError(
            f"bench learning: {path}: got no B steps, expected {B_RATIO} above 0 in an A/B variant; "
            f"give --set {B_RATIO}=0.5"
        )
    if base.data.val_jsonl is None:
        raise ConfigError(f"bench learning: {path}: got no data.val_jsonl, expected one to compare models on")


def _check_same_settings(plan: _Plan) -> None:
    """Refuse to go on with a run that was begun with other settings: its numbers would belong to neither."""
    begun = plan.folder.resolved_config
    if begun.exists() and begun.read_text(encoding="utf-8") != resolved_yaml(plan.config):
        raise ConfigError(
            f"bench learning, {plan.cell.name}: {begun} holds other settings than this bench gives it; "
            "go on with those it was begun with, or give another --output"
        )


def _finished(plan: _Plan) -> CellResult | None:
    """Return the result of a finished cell; raises ConfigError for one of other settings or of none."""
    found = read_json_map(plan.result_file)
    if found is None:
        return None
    if found.get("settings_digest") != plan.digest:
        raise ConfigError(
            f"bench learning, {plan.cell.name}: {plan.result_file} was measured with other settings; "
            "delete it to measure again, or give another --output"
        )
    try:
        return CellResult.from_json(found["result"])
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise ConfigError(
            f"bench learning, {plan.cell.name}: {plan.result_file} holds no result ({exc!r}); "
            "delete it to measure again"
        ) from exc
