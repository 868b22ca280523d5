"""`rollstream up`, `demo`, `eval`, `audit`, `top`, `report`: running and looking at runs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rollstream.commands.loading import load_run
from rollstream.commands.options import (
    AsJson,
    BrokerUrl,
    ConfigPath,
    LogJson,
    Overrides,
    RunPath,
    WatchedPath,
)
from rollstream.run_folder import RunFolder

PIPED_COLUMNS = 160


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (up, down, demo, smoke, audit, top, report, inspect):
        app.command()(command)
    app.command("eval")(evaluate)


def _table_console() -> Console:
    """Return a console for tables: as wide as the terminal, wide enough for whole ids where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=PIPED_COLUMNS)


def up(
    config: ConfigPath,
    steps: Annotated[int | None, typer.Option(help="optimizer steps, instead of training.max_steps")] = None,
    producers: Annotated[int | None, typer.Option(help="producer processes")] = None,
    matchers: Annotated[int | None, typer.Option(help="matcher processes")] = None,
    overrides: Overrides = None,
    log_json: LogJson = False,
) -> None:
    """Run the whole stack on this machine; Ctrl-C stops all of it, the same command goes on with it."""
    from rollstream.models.run_model import make_described_model
    from rollstream.stack.learn_progress import closing_lines
    from rollstream.stack.running import StackOptions, run_stack

    console = Console(soft_wrap=False)
    given = tuple(overrides or ())
    options = StackOptions(steps=steps, producers=producers, matchers=matchers, overrides=given)
    loaded = load_run(config, given)
    make_described_model(loaded)
    result = run_stack(config, loaded, options)
    if result.reason:
        console.print(result.reason, markup=False)
    if result.exit_status:
        raise typer.Exit(result.exit_status)
    for line in ("up: finished", *closing_lines(loaded, config)):
        console.print(line, markup=False, soft_wrap=True)


def demo(
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 48,
    output_dir: Annotated[Path, typer.Option(help="folder of runs")] = Path("runs"),
) -> None:
    """Train the shipped checkpoint on the scenes data, asynchronously, and write a report."""
    from rollstream.commands.demo import run_demo

    status = run_demo(steps=steps, output_dir=output_dir)
    if status:
        raise typer.Exit(status)


def smoke(
    config: ConfigPath,
    num_samples: Annotated[int, typer.Option(help="training samples")] = 16,
    overrides: Overrides = None,
) -> None:
    """Look at the method once: greedy rollouts of a few samples, matched; counters and worked examples."""
    from rollstream.models.run_model import make_described_model
    from rollstream.show.smoke import run_smoke

    loaded = load_run(config, overrides)
    make_described_model(loaded)
    result = run_smoke(loaded, num_samples=num_samples)
    console = Console(soft_wrap=True, highlight=False)
    for name, count in {**result.counters, **result.rejections}.items():
        console.print(f"{name:28} {count}")
    console.print(f"artefacts: {result.folder}", markup=False)


def evaluate(
    config: ConfigPath,
    model: Annotated[
        Path | None, typer.Option(help="model folder; default: the run's latest checkpoint")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="name of the evaluation in the run; default: the checkpoint's name")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="validation images, the first ones")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model on the validation set: F1 with and without classes, COCO AP, each class."""
    from broker_schemas.method.evaluation_numbers import PREFIX, words_of
    from rollstream.evaluation.evaluating import evaluate_run, label_of
    from rollstream.evaluation.side_by_side import render_evaluation
    from rollstream.wiring.access import run_folder

    loaded = load_run(config, overrides)
    name = label or label_of(loaded, model)
    evaluation = evaluate_run(loaded, model=model, label=name, num_samples=num_samples)
    if as_json:
        Console().print_json(json.dumps({**evaluation.metrics, "classes": evaluation.classes}))
    else:
        _table_console().print(render_evaluation(evaluation, f"evaluation {name}"))
        console = Console(soft_wrap=True, highlight=False)
        for number, value in evaluation.metrics.items():
            words = words_of(number, evaluation.gate)
            console.print(f"{number.removeprefix(PREFIX):28} {value:<10.4f} {words}", markup=False)
        folder = run_folder(loaded)
        console.print(f"evaluation: {folder.evaluation(name)}", markup=False)
        console.print(f"next: rollstream report {folder.path}", markup=False)


def audit(
    run: RunPath,
    step: Annotated[int | None, typer.Option(help="show which rollouts trained this optimizer step")] = None,
    sample: Annotated[str | None, typer.Option(help="show what became of this sample's rollouts")] = None,
    as_json: AsJson = False,
) -> None:
    """Prove that every rollout asked for is accounted for; the sums are kept as audit.json."""
    from rollstream.history.audit_view import render_audit, render_sample, render_step
    from rollstream.history.auditing import audit_run, keep_audit

    result = audit_run(run)
    keep_audit(run, result)
    console = _table_console()
    if as_json:
        console.print_json(json.dumps(result.to_json()))
    elif step is not None:
        console.print(render_step(result, step))
    elif sample is not None:
        console.print(render_sample(result, sample))
    else:
        console.print(render_audit(result))
        console.print(f"audit: {RunFolder(run).audit}", markup=False, soft_wrap=True)
    if not result.balanced:
        raise typer.Exit(1)


def inspect(
    run: RunPath,
    record_id: Annotated[str, typer.Argument(help="id of a rollout, as the audit shows it")],
    picture: Annotated[Path | None, typer.Option(help="also draw it into this PNG file")] = None,
) -> None:
    """Show one rollout: its prefix, objects, reasons, matches, targets and masks."""
    from rollstream.show.inspecting import inspect_run

    inspect_run(run, record_id, picture=picture, console=Console())


def down(run: RunPath) -> None:
    """Stop the running stack of a run folder, in order, and wait for it."""
    from rollstream.commands.stopping import stop_stack

    Console().print(stop_stack(RunFolder.existing(run)), markup=False)


def top(
    run: WatchedPath,
    broker: BrokerUrl = None,
    once: Annotated[bool, typer.Option(help="print one picture and end")] = False,
) -> None:
    """Watch a run: depths, lag, rates, who waits on whom; q or Ctrl-C ends it."""
    from rollstream.watch.live_screen import watch
    from rollstream.watch.watched_run import find_run
    from rollstream.watch.watching import live_view

    console = Console()
    with live_view(find_run(run, broker)) as view:
        if once or not console.is_terminal:
            console.print(view.render(int(time.time() * 1000)))
            return
        watch(console, lambda: view.render(int(time.time() * 1000)))


def report(run: WatchedPath, broker: BrokerUrl = None) -> None:
    """Write the report of a run as one HTML page and show its numbers."""
    from rollstream.show.report import build_report, render_terminal, write_report
    from rollstream.watch.watched_run import find_run

    watched = find_run(run, broker)
    folder, logged = watched.folder, watched.logged()
    console = Console()
    if logged.trouble:
        console.print(f"the broker does not answer: {logged.trouble}", style="bold red", markup=False)
    folder.path.mkdir(parents=True, exist_ok=True)
    path = write_report(folder, logged)
    console.print(render_terminal(build_report(folder, logged)))
    console.print(f"report: {path.resolve()}; open it in a browser", markup=False, soft_wrap=True)
