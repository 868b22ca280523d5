"""Runs one rollout request: follow the policy, generate, push. The loop around it is the RQ worker's."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.policy import PublishedPolicy, read_policy
from broker_schemas.broker.rollout_requests import (
    LeaseSettings,
    RolloutRequest,
    release_lease,
    renew_lease,
)
from broker_schemas.broker.trouble_log import TroubleLog
from broker_schemas.client import SegmentSink
from broker_schemas.errors import BrokerError, DeadlinePassed, RollstreamError
from broker_schemas.method.dataset import Sample
from broker_schemas.records.freshness import oldest_allowed
from producers.metrics import ProducerMetrics
from producers.patience import Patience, is_accident
from producers.record_building import build_records
from producers.rollout_backend import RolloutBackend

log = logging.getLogger(__name__)
HUNG_AFTER_TIMEOUT_S: Final = 30.0
PUSH_BATCH: Final = 64
LOOK_EVERY_S: Final = 0.2


@dataclass(frozen=True, kw_only=True)
class ProducerSettings:
    """``deadline_s`` bounds every wait: for a policy, and for room in the broker.

    ``version_window``: how far behind the published policy the weights in use may be.
    ``job_timeout_s``: the lease is kept for so long at most, so that another worker gets what hangs here.
    """

    name: str
    version_window: int
    lease: LeaseSettings
    deadline_s: float = 120.0
    job_timeout_s: int


@dataclass
class Producer:
    """One producer with its model. ``datasets`` maps a purpose to its samples.

    ``is_stopping`` cuts a wait short. ``leave`` is called, from a thread, when a job still hangs 30 s after
    its timeout: no signal reached it.
    """

    broker: Broker
    sink: SegmentSink
    backend: RolloutBackend
    datasets: Mapping[str, Sequence[Sample]]
    metrics: ProducerMetrics
    settings: ProducerSettings
    leave: Callable[[], None] = lambda: None
    is_stopping: Callable[[], bool] = lambda: False
    _patience: Patience = field(default_factory=Patience)
    _follow_patience: Patience = field(default_factory=Patience)
    _trouble: TroubleLog = field(
        default_factory=lambda: TroubleLog(log, "producer: requests go back unspent")
    )
    _following: TroubleLog = field(
        default_factory=lambda: TroubleLog(log, "producer: cannot follow the policy")
    )
    _follow_at_s: float = 0.0
    _not_followed: BaseException | None = None

    def run(self, request: RolloutRequest) -> list[str]:
        """Generate and push the records of ``request``; return what the broker said of each.

        A request that is closed already is left alone: an empty list.
        An accident of the place (weights or images unreadable, a server or a disk that refuses) gives it back
        unspent and waits: an empty list. Raises DataError and others for a request that alone fails; what
        is pushed then is a duplicate in the next try.
        """
        if not renew_lease(self.broker, request.request_id, self.settings.lease):
            return []
        try:
            statuses = self._run(request)
        except Exception as exc:
            self._give_back(request.request_id)
            accident = exc is self._not_followed or is_accident(exc)
            pause_s = self._patience.failed(request.request_id, is_accident=accident)
            if pause_s is None:
                raise
            self._trouble.on_trouble(exc)
            self.metrics.on_paused(pause_s)
            self._wait(pause_s)
            return []
        self._patience.worked()
        self._trouble.on_well()
        return statuses

    def _wait(self, pause_s: float) -> None:
        ends_s = time.monotonic() + pause_s
        while (left_s := ends_s - time.monotonic()) > 0 and not self.is_stopping():
            time.sleep(min(left_s, LOOK_EVERY_S))

    def _run(self, request: RolloutRequest) -> list[str]:
        with self._lease_kept(request.request_id):
            self._follow_policy()
            samples = [self.datasets[request.purpose][index] for index, _ in request.samples]
            started_s = time.monotonic()
            seeds = [seed for _, seed in request.samples]
            generations = self.backend.generate(samples, seeds, purpose=request.purpose)
            generation_s = time.monotonic() - started_s
            records = build_records(
                request,
                samples,
                generations,
                processor_fingerprint=self.backend.processor_fingerprint,
                producer=self.settings.name,
                generated_at_ms=int(time.time() * 1000),
                generation_ms=int(generation_s * 1000),
            )
            num_tokens = sum(len(item.response_token_ids) for item in generations)
            self.metrics.on_generated(num_tokens, generation_s, self.backend.policy_version)
            pushing_s = time.monotonic()
            batches = [records[first : first + PUSH_BATCH] for first in range(0, len(records), PUSH_BATCH)]
            pushed = self.sink.push_batches(batches, deadline_s=self.settings.deadline_s)
            statuses = [status for batch in pushed for status in batch]
            self.metrics.on_pushed(statuses, time.monotonic() - pushing_s)
        return list[str](statuses)

    def _follow_policy(self) -> None:
        give_up_at = time.monotonic() + self.settings.deadline_s
        while (policy := read_policy(self.broker)) is None:
            if time.monotonic() > give_up_at:
                raise DeadlinePassed(
                    f"producer {self.settings.name}: no policy was published in "
                    f"{self.settings.deadline_s:g} s; is the learner running?"
                )
            time.sleep(0.1)
        self._follow(policy)

    def _follow(self, policy: PublishedPolicy) -> None:
        """Take the weights of ``policy``; where they cannot be read, those in use stay while fresh."""
        if time.monotonic() < self._follow_at_s and self._may_stay(policy):
            return
        before, started_s = self.backend.policy_version, time.monotonic()
        try:
            self.backend.follow(policy)
        except (RollstreamError, OSError) as exc:
            self.metrics.on_sync_failed()
            self._following.on_trouble(exc)
            pause_s = self._follow_patience.failed("", is_accident=True) or 0.0
            self._follow_at_s = time.monotonic() + pause_s
            if self._may_stay(policy):
                return
            self._not_followed = exc
            raise
        if self.backend.policy_version != before:
            self.metrics.on_loaded(time.monotonic() - started_s)
        self._following.on_well()
        self._follow_patience.worked()
        self._follow_at_s = 0.0

    def _may_stay(self, policy: PublishedPolicy) -> bool:
        used = self.backend.policy_version
        return used >= 0 and oldest_allowed(policy.policy_version, self.settings.version_window) <= used

    def _give_back(self, request_id: str) -> None:
        """Let the request wait for another try; where the broker is away its lease ends by itself."""
        try:
            release_lease(self.broker, request_id, self.settings.lease)
        except BrokerError as exc:
            log.warning("producer: request %s could not be given back: %s", request_id, exc)

    @contextmanager
    def _lease_kept(self, request_id: str) -> Iterator[None]:
        """Renew the lease from a thread while the body works; a lost broker shows in the body itself."""
        done = threading.Event()
        keeper = threading.Thread(
            target=self._keep_lease, args=(request_id, done), name=f"lease-{request_id}", daemon=True
        )
        try:
            # RQ's timeout may be raised in any line, the start of a thread among them
            keeper.start()
            yield
        finally:
            done.set()
            with suppress(RuntimeError):
                keeper.join()

    def _keep_lease(self, request_id: str, done: threading.Event) -> None:
        timeout_s, pause_s = self.settings.job_timeout_s, self.settings.lease.lease_ms / 3000
        ends_at = time.monotonic() + timeout_s
        while not done.wait(max(0.0, min(pause_s, ends_at - time.monotonic()))):
            if time.monotonic() >= ends_at:
                break
            try:
                renew_lease(self.broker, request_id, self.settings.lease)
            except BrokerError:
                continue
        if done.wait(HUNG_AFTER_TIMEOUT_S):
            return
        log.critical(
            "producer: request %s hangs %g s after its timeout of %d s (producers.job_timeout_s); leaving, "
            "another worker runs it when its lease ends",
            *(request_id, HUNG_AFTER_TIMEOUT_S, timeout_s),
        )
        self.leave()
