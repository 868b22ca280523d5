"""`rollstream track`: hands the numbers of a run to TensorBoard, Weights & Biases or MLflow."""

from __future__ import annotations

import os
import threading
from typing import Annotated

import typer
from rich.console import Console

from rollstream.commands.options import RunPath

Kinds = Annotated[
    list[str] | None, typer.Option("--to", help="tensorboard, wandb or mlflow; default: as the run says")
]
END_OF_OTHER_S = 60.0


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(track)


def track(
    run: RunPath,
    to: Kinds = None,
    project: Annotated[
        str | None, typer.Option(help="wandb's project, mlflow's experiment; default: as the run says")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="go on until Ctrl-C")] = False,
    parent: Annotated[
        int | None, typer.Option(hidden=True, help="with --follow: end with this process")
    ] = None,
) -> None:
    """Send a run's steps, evaluations and queue numbers to trackers; a second time, what is new."""
    from broker_schemas.errors import ConfigError
    from rollstream.run_folder import RunFolder, config_value, read_resolved_config
    from rollstream.watch.tracking import TrackingPlace, followers_of, track_once, track_until
    from rollstream.wiring.access import log_to_stderr, stop_on_signals

    folder = RunFolder.existing(run)
    resolved = read_resolved_config(folder.resolved_config)
    kinds = to or config_value(resolved, "tracking", "to", default=[])
    if not kinds:
        raise ConfigError("track: no tracker is named; give --to tensorboard, wandb or mlflow")
    named = project or config_value(resolved, "tracking", "project", default="rollstream")
    followers = followers_of(folder, kinds, named)
    log_to_stderr(folder.name, "track", 0)
    place = TrackingPlace(folder)
    if follow:
        ended = stop_on_signals()
        if parent is not None:
            threading.Thread(target=_end_with, args=(parent, ended), daemon=True).start()
        place.take(END_OF_OTHER_S)
        is_whole = track_until(followers, ended)
    else:
        place.take(0.0)
        is_whole = track_once(followers)
    for follower in followers:
        Console().print(f"{follower.kind}: {follower.num_sent} rows sent", markup=False)
    if not is_whole:
        # a library's threads and exit hooks may hang: what did not arrive is sent the next time
        os._exit(1)


def _end_with(parent: int, ended: threading.Event) -> None:
    while os.getppid() == parent and not ended.wait(1.0):
        pass
    ended.set()
