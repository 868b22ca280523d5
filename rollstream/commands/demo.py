"""`rollstream demo`: the main job from nothing to a report, on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rich.console import Console
from rich.markup import escape

import configs
from broker_schemas.errors import DataError
from configs import RunConfig, load_config
from rollstream.datasets.scenes import make_scenes
from rollstream.evaluation.evaluating import evaluate_run
from rollstream.evaluation.side_by_side import render_evaluation
from rollstream.history.audit_view import render_audit
from rollstream.history.auditing import audit_run, keep_audit
from rollstream.models.shipped import SHIPPED_MODEL
from rollstream.run_folder import RunFolder
from rollstream.show.report import build_report, render_terminal, write_report
from rollstream.stack.running import StackOptions, run_stack
from rollstream.wiring import access

CONFIG: Final = Path(configs.__file__).parent / "demo.yaml"


def run_demo(*, steps: int, output_dir: Path) -> int:
    """Make the data, evaluate, train asynchronously, evaluate again, report; return the exit status."""
    console = Console()
    name = _free_name(output_dir, "demo")
    overrides = (
        f"run.name={name}",
        f"run.output_dir={output_dir}",
        f"model.name_or_path={SHIPPED_MODEL}",
        f"training.max_steps={steps}",
    )
    config = load_config(CONFIG, overrides)
    folder = access.run_folder(config)
    _make_data(config, console)
    _evaluate(config, console, "before", SHIPPED_MODEL)
    console.print(
        f"[bold]training[/bold] {steps} optimizer steps of {config.variant} in {escape(str(folder.path))}"
    )
    result = run_stack(CONFIG, config, StackOptions(overrides=overrides))
    if result.exit_status:
        console.print(result.reason, markup=False)
        return result.exit_status
    _evaluate(config, console, "after", None)
    return _conclude(folder, console)


def _free_name(output_dir: Path, start: str) -> str:
    """Return a run name that no folder has: every demo is a run of its own."""
    number, name = 1, start
    while (output_dir / name).exists():
        number += 1
        name = f"{start}-{number}"
    return name


def _make_data(config: RunConfig, console: Console) -> None:
    destination = Path(config.data.train_jsonl).parent
    if Path(config.data.train_jsonl).exists():
        return
    console.print(f"[bold]data[/bold] drawing scenes into {escape(str(destination))}")
    make_scenes(destination)


def _evaluate(config: RunConfig, console: Console, label: str, model: Path | None) -> None:
    evaluation = evaluate_run(config, model=model, label=label, num_samples=None)
    console.print(render_evaluation(evaluation, f"evaluation {label}"))


def _conclude(folder: RunFolder, console: Console) -> int:
    audit = audit_run(folder.path)
    keep_audit(folder.path, audit)
    path = write_report(folder)
    console.print(render_terminal(build_report(folder)))
    console.print(render_audit(audit))
    console.print(f"report: {path.resolve()}", soft_wrap=True, markup=False)
    if audit.steps["B"] == 0:
        raise DataError(
            f"demo {folder.path}: no B step was trained; look at {folder.logs_dir} for the producer's log"
        )
    return 0 if audit.balanced else 1
