"""The learner's port over a broker that goes away for a while: every call is tried again until a deadline.

Every call of the port may be repeated, so trying again is safe. It must not know how a broker is reached.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, TypeVar

from broker_schemas.broker.trouble_log import TroubleLog
from broker_schemas.errors import BrokerFull, BrokerUnavailable, DeadlinePassed
from broker_schemas.records.packs import ReadyPack, StepClaim, Untrainable
from broker_schemas.records.records import MatchedSegment
from broker_schemas.records.run_status import RunStatus
from learner.ports import FetchedPack, LearnerBroker
from learner.stall_limits import StallLimits

LOG: Final = logging.getLogger("rollstream.learner")
ASK_AGAIN_S: Final = 0.2
Answer = TypeVar("Answer")


class PatientBroker:
    """Waits for a broker that is away or full; ``claim_step`` and ``filled_packs`` are not waited for:
    their caller has a deadline. Nor is ``fetch_coming``: its caller can do without.

    ``stall_timeout_s`` counts from the first call that failed since one worked. ``clock`` is monotonic.
    All methods raise DeadlinePassed naming the broker, and what the port raises.
    """

    def __init__(
        self,
        broker: LearnerBroker,
        *,
        stall_timeout_s: float,
        clock: Callable[[], float],
        pause: Callable[[float], None],
        is_stopping: Callable[[], bool],
    ) -> None:
        self._broker = broker
        self._limits = StallLimits(total_s=stall_timeout_s)
        self._clock = clock
        self._pause = pause
        self._is_stopping = is_stopping
        self._trouble = TroubleLog(LOG, "broker", clock=clock)

    def claim_step(
        self, *, optimizer_step: int, scheduled_kind: Literal["A", "B"], policy_version: int
    ) -> StepClaim | None:
        """Ask once; raises BrokerError."""
        return self._broker.claim_step(
            optimizer_step=optimizer_step, scheduled_kind=scheduled_kind, policy_version=policy_version
        )

    def filled_packs(self, optimizer_step: int) -> Sequence[tuple[ReadyPack, ...]]:
        """Ask once; raises BrokerError."""
        return self._broker.filled_packs(optimizer_step)

    def fetch_segments(self, record_ids: Sequence[str]) -> list[MatchedSegment]:
        return self._ask(lambda: self._broker.fetch_segments(record_ids))

    def fetch_coming(
        self, rank: int, *, optimizer_step: int, policy_version: int, num_taken: int = 0
    ) -> Sequence[FetchedPack]:
        """Ask once; raises BrokerError, RecordError."""
        return self._broker.fetch_coming(
            rank, optimizer_step=optimizer_step, policy_version=policy_version, num_taken=num_taken
        )

    def quarantine(self, *, optimizer_step: int, segments: Sequence[Untrainable]) -> None:
        self._ask(lambda: self._broker.quarantine(optimizer_step=optimizer_step, segments=segments))

    def commit_step(self, *, optimizer_step: int, summary: Mapping[str, float | int | str]) -> None:
        self._ask(lambda: self._broker.commit_step(optimizer_step=optimizer_step, summary=summary))

    def settle_checkpoint(self, *, optimizer_step: int) -> None:
        self._ask(lambda: self._broker.settle_checkpoint(optimizer_step=optimizer_step))

    def publish_policy(self, *, policy_version: int, optimizer_step: int, weights_path: str) -> None:
        self._ask(
            lambda: self._broker.publish_policy(
                policy_version=policy_version, optimizer_step=optimizer_step, weights_path=weights_path
            )
        )

    def queue_status(self) -> RunStatus | None:
        return self._ask(self._broker.queue_status)

    def close(self) -> None:
        self._broker.close()

    def _ask(self, call: Callable[[], Answer]) -> Answer:
        away_since = None
        while True:
            try:
                answer = call()
            except (BrokerUnavailable, BrokerFull) as exc:
                now = self._clock()
                away_since = now if away_since is None else away_since
                self._trouble.on_trouble(exc)
                limits, is_stopping = self._limits, self._is_stopping()
                limit_s = limits.broker_away_while_stopping_s if is_stopping else limits.broker_away_s
                if now - away_since >= limit_s:
                    raise broker_away(exc, limit_s) from exc
            else:
                self._trouble.on_well()
                return answer
            self._pause(ASK_AGAIN_S)


def broker_away(error: Exception, limit_s: float) -> DeadlinePassed:
    """Return what a rank says that has waited ``limit_s`` for the broker; ``error`` is the last answer."""
    return DeadlinePassed(
        f"broker: it did not come back within {limit_s:g} s (a part of stage2_async.stall_timeout_s); "
        f"the last try: {error}; bring it back, then start again: the run goes on from its last checkpoint"
    )
