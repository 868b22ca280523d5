"""Keeps the processes of a stack running until the learner is done, one gives up, or a signal comes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from broker_schemas.errors import BrokerUnavailable
from rollstream.stack.plan import ARCHIVE, BROKER, LEARNER, RoleName
from rollstream.stack.restart_policy import (
    Decision,
    Finished,
    RestartSettings,
    RoleHistory,
    StartAgain,
    StopStack,
    decide_after_exit,
)
from rollstream.stack.role_messages import ending, error_message, last_lines
from rollstream.stack.role_process import StackProcess

LOOK_EVERY_S: Final = 0.1
STOP_DEADLINE_S: Final = 30.0
FAILED_START_STATUS: Final = 1
# a process that was asked to end before it could listen ends by the signal itself
ORDERLY_STATUSES: Final = (0, -signal.SIGTERM, 128 + signal.SIGTERM)
State = Literal["starting", "running", "restarting", "failed", "done"]


@dataclass(frozen=True, kw_only=True)
class StackResult:
    """How a stack ended; ``reason`` is "" when the learner finished all its steps."""

    exit_status: int
    reason: str = ""


@dataclass(kw_only=True)
class Member:
    """One process and what became of it so far. Times are monotonic seconds."""

    name: RoleName
    process: StackProcess
    state: State = "starting"
    history: RoleHistory = field(default_factory=RoleHistory)
    started_at_s: float = 0.0
    due_at_s: float = 0.0

    def row(self) -> dict[str, Any]:
        """Return what a sample says about it."""
        return {
            "role": self.name.role,
            "index": self.name.index,
            "state": self.state,
            "pid": self.process.pid,
            "restarts": self.history.num_restarts,
        }


class Supervisor:
    """Starts members in order, starts again what dies, stops in the order the data flows.

    ``clock`` is monotonic; ``pause`` waits up to some seconds and ends early when a signal arrives; ``tick``
    is called with the time between two looks; ``say`` tells the operator.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        settings: RestartSettings,
        clock: Callable[[], float],
        pause: Callable[[float], object],
        tick: Callable[[float], object],
        say: Callable[[str], object],
    ) -> None:
        self._members = members
        self._settings = settings
        self._clock = clock
        self._pause = pause
        self._tick = tick
        self._say = say

    def run(self, stop_reason: Callable[[], StackResult | None]) -> StackResult:
        """Return when the stack is to end, for whatever reason; the processes are still there then."""
        for member in self._members:
            result = stop_reason() or (self._start(member) if member.state == "starting" else None)
            if result is not None:
                return result
        while (result := stop_reason() or self._look()) is None:
            self._wait_a_moment()
        return result

    def stay(self, is_done: Callable[[], bool], stop_reason: Callable[[], StackResult | None]) -> None:
        """Keep the processes running after the learner is done, until ``is_done`` or something ends them."""
        while not is_done() and stop_reason() is None and self._look() is None:
            self._wait_a_moment()

    def _wait_a_moment(self) -> None:
        self._tick(self._clock())
        self._pause(LOOK_EVERY_S)

    def _look(self) -> StackResult | None:
        for member in self._members:
            if member.state == "running":
                status = member.process.poll()
                result = None if status is None else self._after_exit(member, status)
            elif member.state == "restarting" and self._clock() >= member.due_at_s:
                result = self._start(member)
            else:
                result = None
            if result is not None:
                return result
        return None

    def _start(self, member: Member) -> StackResult | None:
        member.started_at_s = self._clock()
        try:
            member.process.start()
        except (BrokerUnavailable, OSError) as exc:
            self._say(f"{member.name} does not start: {exc}")
            return self._after_exit(member, FAILED_START_STATUS)
        member.state = "running"
        return None

    def _after_exit(self, member: Member, exit_status: int) -> StackResult | None:
        now_s = self._clock()
        decision: Decision = decide_after_exit(
            exit_status,
            member.history,
            ran_s=now_s - member.started_at_s,
            may_finish=member.name.role == LEARNER,
            settings=self._settings,
        )
        match decision:
            case Finished():
                member.state = "done"
                return StackResult(exit_status=0)
            case StopStack():
                member.state = "failed"
                return self._failure(member, decision, exit_status)
            case StartAgain():
                member.state, member.history = "restarting", decision.history
                member.due_at_s = now_s + decision.delay_s
                self._say(
                    f"{member.name} died ({ending(exit_status)}); starting it again in "
                    f"{decision.delay_s:g} s; its log: {member.process.log_path}"
                )
        return None

    def _failure(self, member: Member, decision: StopStack, exit_status: int) -> StackResult:
        written, path = member.process.written(), member.process.log_path
        if decision.is_refusal:
            reason = f"{member.name} stops the stack: {error_message(written)}\nits log: {path}"
        else:
            reason = (
                f"{member.name} died {self._settings.deaths_allowed} times in a row, the last time with "
                f"{ending(exit_status)}; the stack stops. Its last lines ({path}):\n{last_lines(written)}"
            )
        return StackResult(exit_status=decision.exit_status, reason=reason)

    def stop_roles(self) -> None:
        """End the roles: first those that work, then the archive, which still drains the log.

        Who outlasts the deadline is killed.
        """
        self._stop_group([member for member in self._members if member.name.role not in (ARCHIVE, BROKER)])
        self._stop_group([member for member in self._members if member.name.role == ARCHIVE])

    def stop_broker(self) -> None:
        """End the broker, once nobody needs it any more."""
        self._stop_group([member for member in self._members if member.name.role == BROKER])

    def _stop_group(self, members: Iterable[Member]) -> None:
        running = [member for member in members if member.process.pid is not None]
        for member in running:
            member.process.terminate()
        give_up_at_s = self._clock() + STOP_DEADLINE_S
        while running and self._clock() < give_up_at_s:
            running = [member for member in running if not self._has_ended(member)]
            if running:
                self._wait_a_moment()
        for member in running:
            self._say(f"{member.name} did not end within {STOP_DEADLINE_S:g} s and is killed")
            member.process.kill()

    def _has_ended(self, member: Member) -> bool:
        status = member.process.poll()
        if status is None:
            return False
        member.state = "done"
        if status not in ORDERLY_STATUSES:
            path = member.process.log_path
            self._say(f"{member.name} ended with {ending(status)} while the stack stopped; its log: {path}")
        return True

    def kill(self) -> None:
        """End all members at once."""
        for member in self._members:
            member.process.kill()
