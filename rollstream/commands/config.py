"""`rollstream config`: check, show, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rollstream.commands.help_pages import command_group
from rollstream.commands.loading import load_run

app = command_group()


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="YAML files")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="a.b.c=value")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Check configuration files; all problems of a file in one report."""
    from configs import show

    console = Console(soft_wrap=True, highlight=False)
    reports = show.check_files(files, overrides or ())
    if as_json:
        rows = [
            {
                "file": str(item.file),
                "ok": item.is_ok,
                "problems": [str(problem) for problem in item.problems],
            }
            for item in reports
        ]
        console.print_json(json.dumps(rows))
    else:
        for item in reports:
            console.print(
                f"{item.file}: {'ok' if item.is_ok else f'{len(item.problems)} problems'}", markup=False
            )
            for problem in item.problems:
                console.print(f"  {problem}", markup=False)
    if not as_json and all(item.is_ok for item in reports):
        console.print(f"next: rollstream doctor {files[0]}", markup=False)
    if not all(item.is_ok for item in reports):
        raise typer.Exit(2)


@app.command("show")
def show_config(
    file: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="a.b.c=value")] = None,
    sources: Annotated[bool, typer.Option(help="say where each value comes from")] = True,
) -> None:
    """Show the resolved configuration, with the source of each value."""
    from configs import show

    config = load_run(file, overrides)
    text = show.with_sources(config) if sources else show.resolved_yaml(config)
    Console(soft_wrap=True, highlight=False).print(text, markup=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema, for editors."""
    from configs import show

    Console(soft_wrap=True).print_json(json.dumps(show.json_schema()))
