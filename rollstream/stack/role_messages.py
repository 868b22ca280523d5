"""Finds in the end of a role's log what it said when it ended. Pure."""

from __future__ import annotations

import re
from typing import Final

ERROR_PREFIX: Final = "rollstream: "
NUM_LAST_LINES: Final = 12
_MOST_LINES: Final = 30
# a logging line of ours, a warning of torchrun, or our launcher's last word
_OTHER_LINE: Final = re.compile(
    r"\{\"time\": |\d{4}-\d\d-\d\d |[WEI]\d{4} |torchrun: |" + re.escape(ERROR_PREFIX)
)


def error_message(written: str) -> str:
    """Return the last message of the program's own errors, with all its lines; else the last lines."""
    lines = written.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(ERROR_PREFIX)]
    if not starts:
        return last_lines(written)
    found = [lines[starts[-1]].removeprefix(ERROR_PREFIX)]
    for line in lines[starts[-1] + 1 :]:
        if _OTHER_LINE.match(line):
            break
        found.append(line)
    return "\n".join(found[:_MOST_LINES]).rstrip()


def last_lines(written: str, num_lines: int = NUM_LAST_LINES) -> str:
    """Return the last lines that are not blank, or a word where nothing was written."""
    lines = [line.rstrip() for line in written.splitlines() if line.strip()]
    return "\n".join(lines[-num_lines:]) or "(it wrote nothing)"


def ending(exit_status: int) -> str:
    """Return how a process ended in words: ``status 1``, ``signal 9``."""
    return f"signal {-exit_status}" if exit_status < 0 else f"status {exit_status}"
