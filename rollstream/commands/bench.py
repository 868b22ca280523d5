"""`rollstream bench`: the budgets of the design, measured as ratios in one run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from broker_schemas.errors import ConfigError
from rollstream.commands.help_pages import command_group
from rollstream.commands.options import AsJson, Overrides, Seed

app = command_group()
Quick = Annotated[bool, typer.Option(help="a short look instead of a measurement")]


def _report(run: Callable[..., Any], seed: int, quick: bool, as_json: bool) -> None:
    report = run(seed=seed, quick=quick)
    console = Console(soft_wrap=as_json)
    if as_json:
        console.print_json(json.dumps(report.to_json()))
    else:
        console.print(report.render())


@app.command()
def packing(seed: Seed = 0, quick: Quick = False, as_json: AsJson = False) -> None:
    """Fill and time of the pack selectors."""
    from rollstream.bench.packing import run_packing_bench

    _report(run_packing_bench, seed, quick, as_json)


@app.command()
def matching(seed: Seed = 0, quick: Quick = False, as_json: AsJson = False) -> None:
    """Rollouts a second of parsing, matching, targets and building."""
    from rollstream.bench.matching import run_matching_bench

    _report(run_matching_bench, seed, quick, as_json)


@app.command()
def queue(seed: Seed = 0, quick: Quick = False, as_json: AsJson = False) -> None:
    """The broker's share: throughput against bare Redis commands, memory, bytes, latency, growth."""
    from rollstream.bench.queue import run_queue_bench

    _report(run_queue_bench, seed, quick, as_json)


@app.command()
def pipeline(seed: Seed = 0, quick: Quick = False, as_json: AsJson = False) -> None:
    """The learner's idle share, and steps a second against the same work on policy."""
    from rollstream.bench.pipeline import run_pipeline_bench

    _report(run_pipeline_bench, seed, quick, as_json)


@app.command()
def rollout(seed: Seed = 0, quick: Quick = False, as_json: AsJson = False) -> None:
    """Tokens a second of both rollout backends, and the time of a weight sync; starts vLLM servers."""
    from rollstream.bench.rollout import run_rollout_bench

    _report(run_rollout_bench, seed, quick, as_json)


@app.command()
def learner(
    size: Annotated[str, typer.Option(help="tiny, 2B, 4B or 8B")] = "tiny",
    precision: Annotated[
        str | None, typer.Option(help="bf16 or float32; default as the device has it")
    ] = None,
    checkpointing: Annotated[bool, typer.Option(help="with activation checkpointing")] = False,
    attention: Annotated[str, typer.Option(help="auto, flash or segments")] = "auto",
    lora: Annotated[int | None, typer.Option(help="rank of adapters to train in place of weights")] = None,
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Step time, tokens a second, utilisation and memory of a learner rank, against a plain loop."""
    from rollstream.bench.learner import WAYS, run_learner_bench

    if precision not in (None, "bf16", "float32"):
        raise ConfigError(f"--precision: got {precision!r}, expected bf16 or float32")
    if attention not in WAYS:
        raise ConfigError(f"--attention: got {attention!r}, expected {', '.join(WAYS)}")
    if lora is not None and lora < 1:
        raise ConfigError(f"--lora: got {lora}, expected a rank of 1 or more")
    with Console(stderr=True).status(f"making a model of size {size}"):
        report = run_learner_bench(
            size=size,
            precision=precision,
            is_checkpointing_activations=checkpointing,
            attention=WAYS[attention],
            lora_rank=lora,
            quick=quick,
        )
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps(report.to_json()))
    else:
        console.print(report.render(), markup=False)


@app.command()
def learning(
    config: Annotated[Path | None, typer.Option(help="YAML file; default: the demo's, on scenes")] = None,
    steps: Annotated[int | None, typer.Option(help="optimizer steps of a run", min=1)] = None,
    seeds: Annotated[int, typer.Option(help="runs of every kind, each with its seed", min=1)] = 3,
    b_ratio: Annotated[list[str] | None, typer.Option(help="one more A/B run with this; may repeat")] = None,
    temperature: Annotated[list[str] | None, typer.Option(help="likewise, of sampling")] = None,
    version_window: Annotated[list[str] | None, typer.Option(help="likewise")] = None,
    gate: Annotated[list[str] | None, typer.Option(help="likewise, IoU of a match in training")] = None,
    duplicate_weight: Annotated[list[str] | None, typer.Option(help="likewise")] = None,
    transport: Annotated[list[str] | None, typer.Option(help="likewise: l2_squared, l2 or l1")] = None,
    output: Annotated[Path | None, typer.Option(help="folder; default: runs/learning-<run.name>")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """What rollouts add: A alone against A/B from one checkpoint; the same command goes on with it."""
    from rollstream.bench.learning import LearningOptions, run_learning_bench
    from rollstream.bench.learning_arms import VARIED
    from rollstream.bench.learning_report import learning_json, render_learning

    values = (b_ratio, temperature, version_window, gate, duplicate_weight, transport)
    options = LearningOptions(
        config_path=config,
        steps=steps,
        num_seeds=seeds,
        varied={name: found for name, found in zip(VARIED, values, strict=True) if found},
        output_dir=output,
        overrides=tuple(overrides or ()),
    )
    outcome = run_learning_bench(options, Console(stderr=True, highlight=False))
    console = Console(highlight=False)
    if as_json:
        console.print_json(json.dumps({**learning_json(outcome.bench), "num_run": outcome.num_run}))
    else:
        console.print(render_learning(outcome.bench))
        console.print(f"report: {outcome.page}", markup=False, soft_wrap=True)
    if outcome.exit_status:
        raise typer.Exit(outcome.exit_status)
