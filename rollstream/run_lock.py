"""One stack, and one learner without a broker, per run folder: locks
that the kernel releases at the end of their holder.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from broker_schemas.errors import ConfigError
from rollstream.run_folder import RunFolder


class StackLock:
    """Holds a run folder until ``release`` or the end of this process."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    @classmethod
    def acquire(cls, folder: Path, *, of_learner: bool = False) -> StackLock:
        """Lock an existing run folder; raises ConfigError naming the process that uses it."""
        run, user = RunFolder(folder), "learner" if of_learner else "stack"
        path = run.learner_lock if of_learner else run.stack_lock
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise ConfigError(
                f"run folder {folder}: in use by another {user}, process {holder}; wait until it is done, "
                f"stop it (kill {holder}), or give this run a name of its own (--set run.name=...)"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        return cls(handle)

    @staticmethod
    def check_free(folder: Path) -> None:
        """Raise ConfigError when a stack uses the folder; makes no folder and no file."""
        path = RunFolder(folder).stack_lock
        if path.exists():
            StackLock.acquire(folder).release()

    def is_in_place(self, folder: Path) -> bool:
        """Say whether the lock file of ``folder`` is still the one held: false once the folder was moved."""
        try:
            named = os.stat(RunFolder(folder).stack_lock)
        except OSError:
            return False
        held = os.fstat(self._handle)
        return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)

    def release(self) -> None:
        os.close(self._handle)
