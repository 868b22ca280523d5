"""`rollstream gc`, `replay`, `quarantine`: what a run's queue left behind, in broker and archive."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from rollstream.commands.options import AsJson, RunPath


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("gc")(collect)
    app.command()(replay)
    app.command()(quarantine)


def collect(
    run: RunPath,
    force: Annotated[bool, typer.Option(help="also while a stack uses the run")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete every key of a run from its broker, RQ's included; folder and archive stay."""
    from rollstream.history.gc import collect_run

    done = collect_run(run, force=force)
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps({"num_keys": done.num_keys, "num_file_bytes": done.num_file_bytes}))
    else:
        console.print(f"deleted {done.num_keys} keys and {done.num_file_bytes} bytes of broker files")


def replay(
    run: RunPath,
    from_step: Annotated[
        int | None, typer.Option(help="start from the run's checkpoint of this step")
    ] = None,
    to_step: Annotated[int | None, typer.Option(help="end before this step; default: all archived")] = None,
    packing_selector: Annotated[
        str | None, typer.Option(help="pack each step's segments again: exact, binpacking, fifo")
    ] = None,
    loss: Annotated[
        list[str] | None, typer.Option(help="another loss setting, key=value; may repeat")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train again from the archived log and compare; unchanged, it must be equal to the bit."""
    from rollstream.history.replay import ReplayOptions, replay_run

    options = ReplayOptions(
        first_step=from_step,
        end_step=to_step,
        packing_selector=packing_selector,
        loss=tuple(loss or ()),
    )
    report = replay_run(run, options)
    if as_json:
        Console(soft_wrap=True).print_json(json.dumps(report.to_json()))
    else:
        Console(highlight=False).print(report.render())
    if not report.changes and not report.is_equal:
        raise typer.Exit(1)


def quarantine(
    run: RunPath,
    record_id: Annotated[str, typer.Argument(help="id of a rollout, as the learner's message names it")],
    why: Annotated[str, typer.Option(help="kept with the rollout")] = "by hand",
) -> None:
    """Take a rollout that cannot be trained out of its step, for good; the learner must not run."""
    from rollstream.stack.quarantining import quarantine_record

    step = quarantine_record(run, record_id, detail=why)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{record_id} is out of optimizer step {step}; start the run again", markup=False)
