"""Becomes another program that dies with its parent: no role outlives a stack that is killed.

Run as a script by its path (``python -I -S bound_process.py PARENT PROGRAM ARGUMENT...``), so that it starts
in milliseconds. PARENT is the process id expected, or ``any``. Linux only; elsewhere it only becomes PROGRAM.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1
INIT_PID = 1


def bound_command(command: Sequence[str], *, parent_pid: int | None) -> list[str]:
    """Return ``command`` as a child that is killed when the process that starts it ends.

    ``parent_pid`` None: whoever starts it, unless that one is gone at once. The kernel binds it to the
    thread that starts it, so start it from a thread that lives on.
    """
    parent = "any" if parent_pid is None else str(parent_pid)
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), parent, *command]


def _become(parent: str, command: list[str]) -> None:
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # the parent may have died before the kernel was told
        found = os.getppid()
        if (parent == "any" and found == INIT_PID) or (parent != "any" and found != int(parent)):
            os.kill(os.getpid(), signal.SIGKILL)
    os.execvp(command[0], command)


if __name__ == "__main__":
    _become(sys.argv[1], sys.argv[2:])
