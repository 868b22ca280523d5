"""`rollstream down`: stops the stack that holds a run folder, in its own order, and waits for it."""

from __future__ import annotations

import os
import signal
import time
from typing import Final

from broker_schemas.errors import ConfigError, DeadlinePassed
from rollstream.run_folder import RunFolder
from rollstream.run_lock import StackLock

STOP_DEADLINE_S: Final = 60.0


def stop_stack(folder: RunFolder) -> str:
    """Stop the running stack and return what was done; nothing running is said, not an error.

    Raises DeadlinePassed when the stack still runs after a minute.
    """
    path = folder.stack_lock
    if not is_running(folder):
        return f"{folder.path}: no stack is running"
    holder = int(path.read_text(encoding="utf-8").strip())
    os.kill(holder, signal.SIGTERM)
    give_up_at = time.monotonic() + STOP_DEADLINE_S
    while is_running(folder):
        if time.monotonic() > give_up_at:
            raise DeadlinePassed(
                f"stack {holder} of {folder.path}: still running after {STOP_DEADLINE_S:g} s"
            )
        time.sleep(0.2)
    return f"{folder.path}: stack {holder} stopped"


def is_running(folder: RunFolder) -> bool:
    """Say whether a stack holds the folder."""
    try:
        StackLock.check_free(folder.path)
    except ConfigError:
        return True
    return False
