"""`rollstream sweep`: the tuning grid, run for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rollstream.commands.options import Overrides

ConfigPath = Annotated[Path, typer.Argument(help="the YAML file that every cell starts from")]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(sweep)


def sweep(
    config: ConfigPath,
    grid: Annotated[Path | None, typer.Option(help="grid file; default: the shipped grid")] = None,
    steps: Annotated[int | None, typer.Option(help="optimizer steps of a cell", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="folder; default: runs/sweep-<run.name>")] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Run a grid of settings, one stack after the other; Ctrl-C stops it, the same command goes on."""
    from rollstream.sweep.report import render_sweep
    from rollstream.sweep.running import SHIPPED_GRID, SweepOptions, run_sweep, sweep_json

    options = SweepOptions(
        grid_path=grid or SHIPPED_GRID, steps=steps, output_dir=output, overrides=tuple(overrides or ())
    )
    outcome = run_sweep(config, options, Console(stderr=True, highlight=False))
    console = Console(highlight=False)
    if as_json:
        console.print_json(json.dumps({**sweep_json(outcome.sweep), "num_run": outcome.num_run}))
    else:
        console.print(render_sweep(outcome.sweep))
        console.print(f"report: {outcome.page}", markup=False, soft_wrap=True)
    if outcome.exit_status:
        raise typer.Exit(outcome.exit_status)
