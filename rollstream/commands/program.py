"""The command line: reads arguments, files and environment, calls the parts, turns errors into exit statuses.

Exit statuses: 0 done, 1 a fault of ours, 2 configuration, data or usage, 3 the run stopped for a named
reason, 4 the broker, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from broker_schemas.errors import BrokerError, ConfigError, DataError, RollstreamError, RunStopped
from rollstream.commands import bench as cli_bench
from rollstream.commands import config as cli_config
from rollstream.commands import data as cli_data
from rollstream.commands import operate as cli_operate
from rollstream.commands import queue as cli_queue
from rollstream.commands import runs as cli_runs
from rollstream.commands import security as cli_security
from rollstream.commands import sweep as cli_sweep
from rollstream.commands import tracking as cli_tracking
from rollstream.commands import vllm as cli_vllm
from rollstream.commands.help_pages import PlainGroup
from rollstream.commands.loading import load_run
from rollstream.commands.options import ConfigPath, Index, LogJson, Overrides

if TYPE_CHECKING:
    from configs import RunConfig

app = typer.Typer(
    name="rollstream",
    help="Train vision-language models on their own outputs, without making the trainer wait for them.",
    no_args_is_help=True,
    cls=PlainGroup,
    rich_markup_mode=None,  # frames around the help take a third of its time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_config.app, name="config", help="Check and show configurations.")
app.add_typer(cli_data.data_app, name="data", help="Import and generate data sets.")
app.add_typer(cli_data.model_app, name="model", help="Make models usable, or tiny ones.")
app.add_typer(cli_bench.app, name="bench", help="Measure the budgets.")
app.command()(cli_data.new)
app.command()(cli_data.predict)
cli_runs.register(app)
cli_queue.register(app)
cli_operate.register(app)
cli_sweep.register(app)
cli_tracking.register(app)
cli_security.register(app)
cli_vllm.register(app)


CONFIG_STATUS, STOPPED_STATUS, BROKER_STATUS, INTERRUPTED_STATUS, PIPE_STATUS = 2, 3, 4, 130, 141
_REMEDIES: Final = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EROFS: "the disk is read-only; write to another one",
    errno.EACCES: "get the right to it, or write to another folder",
    errno.EPERM: "get the right to it, or write to another folder",
    errno.ENOTDIR: "a file is in the way; choose another folder",
    errno.EEXIST: "a file is in the way; choose another folder",
}


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("rollstream")
        except PackageNotFoundError:
            number = "not installed: run from its source"
        sys.stdout.write(f"rollstream {number}\n")
        raise typer.Exit(0)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="say the version and end")
    ] = False,
) -> None:
    """Train vision-language models on their own outputs, without making the trainer wait for them."""


def _load(path: Path, overrides: list[str] | None, role: str, index: int) -> RunConfig:
    from rollstream.wiring.access import log_to_stderr

    config = load_run(path, overrides)
    log_to_stderr(config.run.name, role, index)
    return config


@app.command()
def dispatch(
    config: ConfigPath, overrides: Overrides = None, index: Index = 0, log_json: LogJson = False
) -> None:
    """Run the dispatcher: turns demand into rollout jobs."""
    from rollstream.wiring.dispatch import run_dispatcher

    run_dispatcher(_load(config, overrides, "dispatch", index), index)


@app.command()
def produce(
    config: ConfigPath, overrides: Overrides = None, index: Index = 0, log_json: LogJson = False
) -> None:
    """Run one producer: an RQ worker that generates rollouts."""
    from rollstream.wiring.produce import run_producer

    run_producer(_load(config, overrides, "produce", index), index)


@app.command()
def match(
    config: ConfigPath, overrides: Overrides = None, index: Index = 0, log_json: LogJson = False
) -> None:
    """Run one matcher: turns rollouts into training segments."""
    from rollstream.wiring.match import run_matcher

    run_matcher(_load(config, overrides, "match", index), index)


@app.command()
def pack(
    config: ConfigPath, overrides: Overrides = None, index: Index = 0, log_json: LogJson = False
) -> None:
    """Run the packer: fills packs for the learner's ranks."""
    from rollstream.wiring.pack import run_packer

    run_packer(_load(config, overrides, "pack", index), index)


@app.command()
def gather(
    config: ConfigPath, overrides: Overrides = None, index: Index = 0, log_json: LogJson = False
) -> None:
    """Run the evaluator: gathers what producers answer for the validation set, beside training."""
    from rollstream.evaluation.in_stack import run_evaluator

    run_evaluator(_load(config, overrides, "gather", index), index)


@app.command()
def archive(
    config: ConfigPath, overrides: Overrides = None, index: Index = 0, log_json: LogJson = False
) -> None:
    """Run the archive: keeps events and payloads in the run folder."""
    from rollstream.history.keep_archive import run_archive

    run_archive(_load(config, overrides, "archive", index), index)


@app.command()
def learn(config: ConfigPath, overrides: Overrides = None, log_json: LogJson = False) -> None:
    """Run the learner; with b_ratio 0 and no broker it is the warm start and needs nothing else."""
    from rollstream.stack.learning import learn_or_spawn

    status = learn_or_spawn(config, tuple(overrides or ()))
    if status:
        raise typer.Exit(status)


def main(arguments: list[str] | None = None) -> None:
    """Run the program; errors that we know end with one message and their exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # odd text in data ends no command
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        status: Any = app(args=arguments, standalone_mode=False)
        sys.stdout.flush()
    except RollstreamError as exc:
        _say(console, exc)
        sys.exit(_status_of(exc))
    except typer.Exit as exc:
        sys.exit(exc.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        console.print("interrupted")
        sys.exit(INTERRUPTED_STATUS)
    except BrokenPipeError:
        # the reader went away, as `head` does; nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(PIPE_STATUS)
    except OSError as exc:
        _say(console, _place_problem(exc))
        sys.exit(CONFIG_STATUS)
    except Exception as exc:
        if exc.__class__.__module__.startswith(("click", "typer")):  # usage errors of the command line itself
            exc.show() if hasattr(exc, "show") else _say(console, exc)
            sys.exit(CONFIG_STATUS)
        raise
    sys.exit(status if isinstance(status, int) else 0)


def _place_problem(error: OSError) -> str:
    """Return what a file, a folder or the disk refused, and what to do; our own faults have no file."""
    if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise error
    remedy = _REMEDIES.get(error.errno or 0, "check the path")
    place = f"{error.filename}: " if error.filename is not None else ""
    return f"{place}{(error.strerror or str(error)).lower()}; {remedy}"


def _say(console: Console, error: BaseException | str) -> None:
    from rollstream.show.visible_text import visible_text

    console.print(visible_text(f"rollstream: {error}"), markup=False)


def _status_of(error: RollstreamError) -> int:
    if isinstance(error, ConfigError | DataError):
        return CONFIG_STATUS
    if isinstance(error, RunStopped):
        return STOPPED_STATUS
    return BROKER_STATUS if isinstance(error, BrokerError) else 1


if __name__ == "__main__":
    main()
