"""The full-screen view behind ``rollstream top``: draws until q or Ctrl-C, and gives the terminal back clean.

Owns the keyboard and the screen; what is drawn is the caller's.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console, RenderableType
from rich.live import Live

REFRESH_EVERY_S: Final = 0.5
LARGEST_READ_BYTES: Final = 64


def watch(console: Console, picture: Callable[[], RenderableType]) -> None:
    """Draw ``picture()`` twice a second on a screen of its own until q is pressed or Ctrl-C comes."""
    with keys_one_by_one() as keyboard:
        try:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while True:
                    live.update(picture(), refresh=True)
                    if asks_to_quit(keyboard, REFRESH_EVERY_S):
                        return
        except KeyboardInterrupt:
            return


@contextmanager
def keys_one_by_one() -> Iterator[int | None]:
    """Read keys without Return and unseen, then put the terminal back; yields None without a terminal."""
    try:
        keyboard = sys.stdin.fileno()
        before = termios.tcgetattr(keyboard)
    except (termios.error, OSError, ValueError):
        yield None
        return
    try:
        tty.setcbreak(keyboard)
        yield keyboard
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def asks_to_quit(keyboard: int | None, timeout_s: float) -> bool:
    """Return True when q is pressed within ``timeout_s``, False at its end; other keys are swallowed."""
    end_s = time.monotonic() + timeout_s
    while (left_s := end_s - time.monotonic()) > 0:
        if keyboard is None:
            time.sleep(left_s)
            return False
        if select.select([keyboard], [], [], left_s)[0]:
            pressed = os.read(keyboard, LARGEST_READ_BYTES)
            if not pressed:  # the terminal is gone: without a pause this would spin
                return True
            if b"q" in pressed.lower():
                return True
    return False
