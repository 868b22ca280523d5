"""What becomes of a role that ended: done, started again, or the end of the whole stack. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

DONE_STATUS: Final = 0
CONFIG_STATUS: Final = 2
STOPPED_STATUS: Final = 3


@dataclass(frozen=True, kw_only=True)
class RestartSettings:
    """Delays double from ``first_delay_s`` to ``longest_delay_s``; a role that ran ``healthy_after_s``
    starts anew; the death number ``deaths_allowed`` without that is the last.
    """

    first_delay_s: float = 0.5
    longest_delay_s: float = 15.0
    healthy_after_s: float = 60.0
    deaths_allowed: int = 5


@dataclass(frozen=True, kw_only=True)
class RoleHistory:
    """``deaths_in_row`` counts since the last time of health, ``num_restarts`` since the stack started."""

    deaths_in_row: int = 0
    num_restarts: int = 0


@dataclass(frozen=True)
class Finished:
    """The role did all its work, and with it the stack."""


@dataclass(frozen=True)
class StopStack:
    """Another start would end the same way: stop everything, with this exit status of ``rollstream up``.

    ``is_refusal`` is true where the role said why itself, false where it died too often.
    """

    exit_status: int
    is_refusal: bool


@dataclass(frozen=True)
class StartAgain:
    """Start the role again after ``delay_s``; ``history`` is its history from now on."""

    delay_s: float
    history: RoleHistory


Decision = Finished | StopStack | StartAgain


def decide_after_exit(
    exit_status: int,
    history: RoleHistory,
    *,
    ran_s: float,
    may_finish: bool,
    settings: RestartSettings,
) -> Decision:
    """Return what to do about a role that ended by itself after ``ran_s`` seconds.

    ``exit_status`` is negative for a signal. Only a role that ``may_finish`` (the learner) is done with
    status 0; the others serve until they are stopped, so their end is a death whatever its status.
    """
    if exit_status == DONE_STATUS and may_finish:
        return Finished()
    if exit_status in (CONFIG_STATUS, STOPPED_STATUS):
        return StopStack(exit_status, is_refusal=True)
    deaths = 1 if ran_s >= settings.healthy_after_s else history.deaths_in_row + 1
    if deaths >= settings.deaths_allowed:
        return StopStack(STOPPED_STATUS, is_refusal=False)
    delay_s = min(settings.first_delay_s * 2 ** (deaths - 1), settings.longest_delay_s)
    return StartAgain(delay_s, RoleHistory(deaths_in_row=deaths, num_restarts=history.num_restarts + 1))
