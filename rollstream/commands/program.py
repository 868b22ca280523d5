"""The command line: reads arguments, files and environment, calls the parts, turns errors into exit statuses.

Exit statuses: 0 done, 1 a fault of ours, 2 configuration, data or usage, 3 the run stopped for a named
reason, 4 the broker, 130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from broker_schemas.errors import BrokerError, ConfigError, DataError, RollstreamError, RunStopped
from configs import RunConfig, load_config
from rollstream.commands import bench as cli_bench
from rollstream.commands import config as cli_config
from rollstream.commands import data as cli_data
from rollstream.commands import operate as cli_operate
from rollstream.commands import queue as cli_queue
from rollstream.commands import runs as cli_runs
from rollstream.commands import security as cli_security
from rollstream.commands import sweep as cli_sweep
from rollstream.commands import vllm as cli_vllm

app = typer.Typer(
    name="rollstream",
    help="Train vision-language models on their own outputs, without making the trainer wait for them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(cli_config.app, name="config", help="Check and show configurations.")
app.add_typer(cli_data.data_app, name="data", help="Import and generate data sets.")
app.add_typer(cli_data.model_app, name="model", help="Make tiny models.")
app.add_typer(cli_bench.app, name="bench", help="Measure the budgets.")
cli_runs.register(app)
cli_queue.register(app)
cli_operate.register(app)
cli_sweep.register(app)
cli_security.register(app)
cli_vllm.register(app)

ConfigPath = Annotated[Path, typer.Argument(help="the run's YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override a key: a.b.c=value; may be given again")
]
Index = Annotated[int, typer.Option(help="number of this process among those of its role")]

CONFIG_STATUS, STOPPED_STATUS, BROKER_STATUS, INTERRUPTED_STATUS = 2, 3, 4, 130


def _load(path: Path, overrides: list[str] | None, role: str, index: int) -> RunConfig:
    from rollstream.wiring.access import log_to_stderr

    config = load_config(path, tuple(overrides or ()))
    log_to_stderr(config.run.name, role, index)
    return config


@app.command()
def dispatch(config: ConfigPath, overrides: Overrides = None, index: Index = 0) -> None:
    """Run the dispatcher: turns demand into rollout jobs."""
    from rollstream.wiring.dispatch import run_dispatcher

    run_dispatcher(_load(config, overrides, "dispatch", index), index)


@app.command()
def produce(config: ConfigPath, overrides: Overrides = None, index: Index = 0) -> None:
    """Run one producer: an RQ worker that generates rollouts."""
    from rollstream.wiring.produce import run_producer

    run_producer(_load(config, overrides, "produce", index), index)


@app.command()
def match(config: ConfigPath, overrides: Overrides = None, index: Index = 0) -> None:
    """Run one matcher: turns rollouts into training segments."""
    from rollstream.wiring.match import run_matcher

    run_matcher(_load(config, overrides, "match", index), index)


@app.command()
def pack(config: ConfigPath, overrides: Overrides = None, index: Index = 0) -> None:
    """Run the packer: fills packs for the learner's ranks."""
    from rollstream.wiring.pack import run_packer

    run_packer(_load(config, overrides, "pack", index), index)


@app.command()
def archive(config: ConfigPath, overrides: Overrides = None, index: Index = 0) -> None:
    """Run the archive: keeps events and payloads in the run folder."""
    from rollstream.history.keep_archive import run_archive

    run_archive(_load(config, overrides, "archive", index), index)


@app.command()
def learn(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run the learner; with b_ratio 0 and no broker it is the warm start and needs nothing else."""
    from rollstream.stack.learning import learn_or_spawn

    status = learn_or_spawn(config, tuple(overrides or ()))
    if status:
        raise typer.Exit(status)


def main(arguments: list[str] | None = None) -> None:
    """Run the program; errors that we know end with one message and their exit status."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        status: Any = app(args=arguments, standalone_mode=False)
    except RollstreamError as exc:
        _say(console, exc)
        sys.exit(_status_of(exc))
    except typer.Exit as exc:
        sys.exit(exc.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        console.print("interrupted")
        sys.exit(INTERRUPTED_STATUS)
    except Exception as exc:
        if exc.__class__.__module__.startswith(("click", "typer")):  # usage errors of the command line itself
            exc.show() if hasattr(exc, "show") else _say(console, exc)
            sys.exit(CONFIG_STATUS)
        raise
    sys.exit(status if isinstance(status, int) else 0)


def _say(console: Console, error: BaseException) -> None:
    console.print(f"rollstream: {error}", markup=False)


def _status_of(error: RollstreamError) -> int:
    if isinstance(error, ConfigError | DataError):
        return CONFIG_STATUS
    if isinstance(error, RunStopped):
        return STOPPED_STATUS
    return BROKER_STATUS if isinstance(error, BrokerError) else 1


if __name__ == "__main__":
    main()
