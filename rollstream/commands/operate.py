"""`rollstream prepare`, `export`, `dashboards`, `doctor`: what stands around a run, and is it well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from broker_schemas.errors import ConfigError
from rollstream.commands.loading import load_run
from rollstream.commands.options import AsJson, ConfigPath, Index, LogJson, Overrides

if TYPE_CHECKING:
    from configs import RunConfig


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (prepare, export, dashboards, doctor):
        app.command()(command)


def prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Look for a run's data and model; the demo's own are made where they are missing, and nothing else."""
    from rollstream.commands.preparing import default_passwords, prepare_inputs

    console = Console(soft_wrap=True, highlight=False)
    for line in prepare_inputs(load_run(config, overrides)):
        console.print(line, markup=False)
    for name in default_passwords():
        console.print(
            f"warning: {name} is the default, which everybody can read; set it in .env", markup=False
        )


def export(
    config: ConfigPath,
    overrides: Overrides = None,
    index: Index = 0,
    log_json: LogJson = False,
) -> None:
    """Run the exporter: shows Prometheus what only the broker knows."""
    from rollstream.watch.export import run_exporter
    from rollstream.wiring.access import log_to_stderr

    loaded = load_run(config, overrides)
    log_to_stderr(loaded.run.name, "export", index)
    run_exporter(loaded, index)


def dashboards(
    context: typer.Context,
    root: Annotated[Path, typer.Argument(help="the project's root")] = Path(),
    check: Annotated[bool, typer.Option(help="write nothing; exit status 1 when a file is old")] = False,
) -> None:
    """Write what comes from code: dashboards, and the pages of metrics, keys, commands and library names."""
    from rollstream.commands.pages import outdated_files, write_generated

    program = context.find_root().command
    found = (outdated_files if check else write_generated)(program, root)
    console = Console(soft_wrap=True, highlight=False)
    for path in found:
        console.print(f"{'old' if check else 'wrote'} {path}", markup=False)
    if check and found:
        raise typer.Exit(1)


def doctor(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="what the learner takes, computed before anything is loaded")
    ] = False,
    size: Annotated[
        str | None, typer.Option(help="with --memory: a published size (tiny, 2B, 4B, 8B) as the model")
    ] = None,
    gpu_gb: Annotated[
        float | None, typer.Option(help="with --memory: gigabytes of a GPU, where it is not in this machine")
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="with --memory: the published sizes on 1 to 8 GPUs, as Markdown")
    ] = False,
) -> None:
    """Check everything that a run needs, and say what to change; exit status 1 when something fails."""
    loaded = load_run(config, overrides)
    if memory and table:
        _doctor_table(loaded, has_choice=size is not None or gpu_gb is not None or as_json)
        return
    if memory:
        _doctor_memory(loaded, size, gpu_gb, as_json)
        return
    if size is not None or gpu_gb is not None or table:
        raise ConfigError(
            "doctor: got --size, --gpu-gb or --table without --memory, which alone reads them; add it"
        )
    from rollstream.doctor.examining import examine, render_findings, verdict_line

    findings = examine(loaded)
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps([finding.to_json() for finding in findings]))
    else:
        console.print(render_findings(findings))
        console.print(verdict_line(findings, loaded, config), markup=False)
    if any(finding.verdict == "fail" for finding in findings):
        raise typer.Exit(1)


def _doctor_table(config: RunConfig, *, has_choice: bool) -> None:
    from rollstream.doctor.fitting_table import measure_rows, render_fitting

    if has_choice:
        raise ConfigError(
            "doctor --table: got --size, --gpu-gb or --json too, but it shows all; take them out"
        )
    with Console(stderr=True).status("computing the memory of rows"):
        rows = measure_rows(config)
    Console(soft_wrap=True, highlight=False).print(render_fitting(config, rows), markup=False)


def _doctor_memory(config: RunConfig, size: str | None, gpu_gb: float | None, as_json: bool) -> None:
    from rollstream.doctor.memory import examine_memory
    from rollstream.doctor.memory_table import memory_to_json, render_memory

    with Console(stderr=True).status("computing the memory of a row"):
        report = examine_memory(config, size=size, gpu_gb=gpu_gb)
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps(memory_to_json(report)))
    else:
        console.print(render_memory(report), markup=False)
    if report.advice:
        raise typer.Exit(1)
