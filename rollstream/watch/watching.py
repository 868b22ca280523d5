"""Puts together what `rollstream top` shows: a live view on the broker, or on what a run left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from broker_schemas.broker.connection import broker_errors
from broker_schemas.errors import BrokerError, BrokerRefused, ConfigError
from rollstream.run_folder import JsonLinesReader, Row
from rollstream.watch.broker_follower import SupervisedRoles, follower_of, now_ms
from rollstream.watch.live_table import LiveView, StepSource, ViewSettings
from rollstream.watch.watched_run import WatchedRun


class OnceRead:
    """Rows that are there already, given out once."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def read_new(self) -> list[Row]:
        """Return all rows at the first call, none afterwards."""
        rows, self._rows = self._rows, []
        return rows


@contextmanager
def live_view(run: WatchedRun) -> Iterator[LiveView]:
    """Yield the view of a run; its broker is followed within the block.

    Raises ConfigError where there is nothing to see, BrokerRefused for a broker that does not let us in.
    """
    settings = _settings(run)
    supervised = SupervisedRoles(run.folder)
    if run.address is None and supervised.read(now_ms()) is not None:
        yield LiveView(run.folder, settings=settings)
        return
    if run.address is None or _has_forgotten(run):
        yield _past_view(run, settings)
        return
    follower = follower_of(run, supervised)
    follower.start()
    try:
        steps = StepSource(run.folder.train_log, follower.steps)
        yield LiveView(run.folder, samples=follower, steps=steps, settings=settings)
    finally:
        follower.stop()


def _past_view(run: WatchedRun, settings: ViewSettings | None) -> LiveView:
    archived = run.archived()
    samples = archived.samples or JsonLinesReader(run.folder.stack_samples).read_new()
    steps = JsonLinesReader(run.folder.train_log).read_new() or archived.steps
    if not samples and not steps:
        raise ConfigError(
            f"run folder {run.folder.path}: no stack runs, and neither archive nor training log is there; "
            "start it, or name a broker with --broker redis://host:port/0"
        )
    return LiveView(
        run.folder, samples=OnceRead(samples), steps=OnceRead(steps), settings=settings, is_over=True
    )


def _has_forgotten(run: WatchedRun) -> bool:
    """Return whether the broker answers and knows nothing of a run that left an archive.

    Raises BrokerRefused.
    """
    if not run.folder.archive_dir.exists():
        return False
    broker = run.broker()
    try:
        with broker_errors("asking the broker for the run"):
            return not broker.client.exists(broker.keys.named("counters"), broker.keys.named("events"))
    except BrokerRefused:
        raise
    except BrokerError:
        return False
    finally:
        broker.close()


def _settings(run: WatchedRun) -> ViewSettings | None:
    if run.config is None:
        return None
    config = run.config
    return ViewSettings(
        run_name=config.run.name,
        variant=config.variant,
        max_steps=config.training.max_steps,
        queue_limit=config.stage2_async.queue_limit,
    )
