"""Processes below a process, found in /proc, so that none is left behind; empty where there is no /proc."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


def children_by_parent() -> dict[int, list[int]]:
    """Return the process ids below each process id; processes that end meanwhile may be missing."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            # the name in brackets may hold spaces and brackets, so count from its end
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        found.setdefault(int(fields[1]), []).append(int(entry.name))
    return found


def children(pid: int) -> list[int]:
    """Return the direct children of a process."""
    return children_by_parent().get(pid, [])


def descendants(pid: int) -> list[int]:
    """Return all processes below ``pid``, without itself, parents first."""
    below, found = children_by_parent(), [pid]
    for parent in found:
        found.extend(below.get(parent, []))
    return found[1:]


def send_signal(pid: int, number: signal.Signals) -> None:
    """Signal a process; one that is gone already is none of our business."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_tree(pid: int) -> None:
    """Kill a process, its process group and everything below it. ``pid`` must not be reaped yet."""
    doomed = descendants(pid)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    for each in (pid, *doomed):
        send_signal(each, signal.SIGKILL)
