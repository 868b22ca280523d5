"""The process that hands a learner's numbers to trackers; whatever becomes of it, the learner goes on."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from configs import RunConfig
from rollstream.wiring import access
from rollstream.wiring.package_paths import safe_environment

LOG = logging.getLogger("rollstream.tracking")
END_WAIT_S: Final = 10.0


@contextmanager
def tracking(config: RunConfig) -> Iterator[None]:
    """Track the run while the block runs, where the configuration names trackers.

    At the end the rest is sent; what takes longer than END_WAIT_S goes on without anybody waiting.
    """
    process = _start(config) if config.tracking.to else None
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
            try:
                process.wait(END_WAIT_S)
            except subprocess.TimeoutExpired:
                LOG.warning(
                    "trackers still send; 'rollstream track %s' sends what is missing then", _path(config)
                )


def _path(config: RunConfig) -> str:
    return str(access.run_folder(config).path)


def _start(config: RunConfig) -> subprocess.Popen[bytes] | None:
    folder = access.run_folder(config)
    command = [
        *(sys.executable, "-P", "-m", "rollstream.commands.program", "track", str(folder.path), "--follow"),
        *("--parent", str(os.getpid()), "--project", config.tracking.project),
        *(part for kind in config.tracking.to for part in ("--to", kind)),
    ]
    log_path = folder.role_log("track", 0)
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            # a session of its own: Ctrl-C ends the learner, which lets it send the rest
            process = subprocess.Popen(
                command,
                env=safe_environment(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
    except OSError as exc:
        LOG.warning("trackers cannot be started, the run goes on without: %s", exc)
        return None
    LOG.info("trackers %s: see %s", ", ".join(config.tracking.to), log_path)
    return process
