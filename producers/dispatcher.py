"""The dispatcher's loop: turns demand into requests and jobs, and runs abandoned ones again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.evaluation_rounds import read_evaluation_state
from broker_schemas.broker.role_loop import keep_stepping
from broker_schemas.broker.rollout_requests import (
    LeaseSettings,
    ReissuedRequest,
    RolloutRequest,
    fail_request,
    issue_requests,
    read_cursor,
    reissue_expired,
    say_demand_advice,
)
from broker_schemas.broker.status import RunStatus, read_status
from broker_schemas.broker.trouble_log import RoundCounts
from broker_schemas.records.freshness import oldest_allowed
from broker_schemas.records.records import NOT_STEP_BOUND
from producers.asked_again import StaleRollouts
from producers.demand import DemandSettings, decide_demand, requests_to_issue
from producers.demand_tracking import DemandTracker
from producers.evaluation_demand import EvaluationSettings, has_room, is_over, next_chunk
from producers.freshness_advice import freshness_advice
from producers.jobs import RolloutQueue, enqueue_request, failed_requests, job_id_of
from producers.metrics import DispatcherMetrics
from producers.patience import FailureBrake
from producers.request_building import build_requests
from producers.step_demand import rollouts_for_open_step

log = logging.getLogger(__name__)
LEASE_CHECK_EVERY_S = 1.0
EVALUATION_CHECK_EVERY_S = 0.25


@dataclass(frozen=True, kw_only=True)
class DispatcherSettings:
    """``demand`` is None for the on-policy variants: they serve exactly the open step.

    ``evaluation`` is None where nobody asks for the validation set.
    """

    world_size: int
    num_samples: int
    seed: int
    request_size: int
    demand: DemandSettings | None
    capacity_tokens: int
    evaluation: EvaluationSettings | None = None
    start_segments_per_pack: float = 4.0
    lease: LeaseSettings
    job_timeout_s: int
    poll_s: float = 0.1


class Dispatcher:
    """One dispatcher; a second one beside it does no harm."""

    def __init__(
        self, broker: Broker, queue: RolloutQueue, metrics: DispatcherMetrics, settings: DispatcherSettings
    ) -> None:
        self._broker = broker
        self._queue = queue
        self._metrics = metrics
        self._settings = settings
        self._tracker = DemandTracker(settings.start_segments_per_pack, settings.capacity_tokens)
        self._leases_checked_at_s = 0.0
        self._advice = ""
        self._failed_jobs: set[str] = set()
        self._said = RoundCounts()
        self._brake = FailureBrake()
        self._num_waiting_jobs = 0
        self._on_their_way: set[str] = set()
        self._stale = StaleRollouts(broker)
        self._evaluate_at_s = 0.0
        self._pushed_at_last_chunk = 0

    def loop(self, stop: threading.Event) -> None:
        """Step until ``stop``; a broker that is away is waited for."""
        keep_stepping(
            lambda: self.step(time.monotonic()), stop, role="dispatcher", pause_s=self._settings.poll_s
        )

    def step(self, now_s: float) -> int:
        """Look once, issue what is wanted; return the number of rollouts asked for. Raises BrokerError."""
        if now_s - self._leases_checked_at_s >= LEASE_CHECK_EVERY_S:
            self._leases_checked_at_s = now_s
            self._give_up_failed()
            self._run_again()
            self._num_waiting_jobs = len(self._queue.waiting_job_ids())
        demand = self._settings.demand
        status = read_status(self._broker, self._settings.world_size, with_ready_versions=demand is not None)
        self._metrics.on_status(status.outstanding)
        self._tell_jobs_and_freshness(status)
        if status.policy_version < 0:
            return 0
        if self._settings.evaluation is not None and now_s >= self._evaluate_at_s:
            self._evaluate_at_s = now_s + EVALUATION_CHECK_EVERY_S
            self._evaluate(status, self._settings.evaluation)
        if self._settings.evaluation is not None and is_over(status, self._settings.evaluation):
            return 0
        wanted = self._wanted(status)
        self._note_endings(status, now_s)
        if wanted and not self._brake.may_issue(now_s):
            return 0
        return self._issue(wanted, status) if wanted else 0

    def _evaluate(self, status: RunStatus, settings: EvaluationSettings) -> None:
        """Ask for the next chunk of the validation set, where one is due and training can spare the place."""
        state = read_evaluation_state(self._broker)
        chunk = next_chunk(state, status.policy_version, settings)
        if chunk is None or not has_room(
            status,
            pushed_at_last_chunk=self._pushed_at_last_chunk,
            num_workers=self._queue.num_workers(),
            settings=settings,
        ):
            return
        request = chunk.request(self._broker.keys.run)
        if issue_requests(
            self._broker,
            [request],
            cursor=state.cursor,
            next_cursor=chunk.next_cursor,
            lease=self._settings.lease,
            key="evaluation",
        ):
            self._pushed_at_last_chunk = status.total("pushed")
            self._enqueue([request], attempt=1)
            if chunk.start == 0:
                log.info("dispatcher: policy version %d is evaluated", chunk.policy_version)

    def _tell_jobs_and_freshness(self, status: RunStatus) -> None:
        size = self._settings.request_size
        self._metrics.on_jobs(self._num_waiting_jobs, -(-status.total("open_records") // size))
        demand, ready = self._settings.demand, [version for rank in status.ready_versions for version in rank]
        if demand is not None and ready:
            self._metrics.on_ready(min(ready), oldest_allowed(status.policy_version, demand.version_window))

    def _wanted(self, status: RunStatus) -> int:
        demand = self._settings.demand
        if demand is None:
            return rollouts_for_open_step(status)
        state = self._tracker.observe(status, demand)
        self._advise(freshness_advice(demand.claim_rule, self._tracker.typical_generation_steps))
        self._metrics.on_generation_steps(self._tracker.typical_generation_steps)
        if requests_to_issue(state, demand) == 0:
            return 0
        return decide_demand(state, demand).num_rollouts

    def _note_endings(self, status: RunStatus, now_s: float) -> None:
        """Slow down while most of what ends is rejected."""
        num_bad = sum(status.by_reason("rejected").values())
        if self._brake.observe(status.total("matched") + status.total("evaluated"), num_bad, now_s):
            if self._brake.is_braking:
                log.warning("dispatcher: most rollouts are rejected; asking for fewer until that ends")
            else:
                log.info("dispatcher: rollouts are used again; asking for as many as are wanted")

    def _advise(self, advice: str) -> None:
        """Tell the log and, through the broker, whoever watches the run; each sentence once."""
        if advice == self._advice:
            return
        say_demand_advice(self._broker, advice)
        self._advice = advice
        if advice:
            log.warning("dispatcher: %s", advice)
        else:
            log.info("dispatcher: every scheduled B step can be served fresh again")

    def _issue(self, num_rollouts: int, status: RunStatus) -> int:
        settings = self._settings
        cursor = read_cursor(self._broker)
        again = self._stale.first(num_rollouts, status.total("dropped:stale")) if settings.demand else []
        requests = [
            item.request(
                self._broker.keys.run,
                num_samples=settings.num_samples,
                seed=settings.seed,
                policy_version=status.policy_version,
            )
            for item in again
        ]
        next_cursor = cursor + num_rollouts - len(again)
        step_bound = settings.demand is None and status.open_step is not None
        requests += build_requests(
            self._broker.keys.run,
            cursor=cursor,
            num_rollouts=next_cursor - cursor,
            request_size=settings.request_size,
            num_samples=settings.num_samples,
            seed=settings.seed,
            policy_version=status.policy_version,
            optimizer_step=status.open_step.optimizer_step
            if step_bound and status.open_step
            else NOT_STEP_BOUND,
        )
        issued = issue_requests(
            self._broker,
            requests,
            cursor=cursor,
            next_cursor=next_cursor,
            lease=settings.lease,
            stale_after=(self._stale.asked_up_to, again[-1].place) if again else None,
        )
        self._stale.forget(len(again) if issued else None)
        if not issued:
            return 0
        self._tracker.on_issued(status.total("requested") + num_rollouts, status.total("committed_steps"))
        self._enqueue(requests, attempt=1)
        self._metrics.on_issued(num_rollouts, again=len(again))
        return num_rollouts

    def _enqueue(self, requests: Sequence[RolloutRequest], *, attempt: int) -> None:
        for request in requests:
            enqueue_request(self._queue, request, attempt=attempt, job_timeout_s=self._settings.job_timeout_s)

    def _run_again(self) -> None:
        """Enqueue what a worker let go of, and what waits for a worker without being in the queue."""
        due = reissue_expired(self._broker, self._settings.lease)
        waiting = [item for item in due if item.waits]
        again = [item for item in due if not item.waits]
        for item in again:
            self._say("was abandoned", item.request.request_id, f"attempt {item.attempt}")
        lost = self._lost(waiting) if waiting else []
        for item in lost:
            self._say("waits without a job", item.request.request_id, "enqueued again")
        for item in (*again, *lost):
            self._enqueue([item.request], attempt=item.attempt)
        self._metrics.on_reissued(len(again))

    def _say(self, what: str, request_id: str, detail: str) -> None:
        if number := self._said.due(what):
            log.warning("dispatcher: request %s %s (%s); %d so far", *(request_id, what, detail, number))

    def _lost(self, waiting: Sequence[ReissuedRequest]) -> list[ReissuedRequest]:
        """Return the requests whose job is neither in the queue nor newly on its way to a worker."""
        in_queue, on_their_way = self._queue.waiting_job_ids(), self._queue.taken_job_ids()
        # a worker that died between taking a job and starting it leaves it on its way for ever
        safe = in_queue | (on_their_way - self._on_their_way)
        self._on_their_way = on_their_way
        return [item for item in waiting if job_id_of(item.request.request_id, item.attempt) not in safe]

    def _give_up_failed(self) -> None:
        """Give up the requests of jobs that failed for good, each once, however many failed at a time."""
        found = failed_requests(self._queue, self._failed_jobs)
        for request_id, job_id, reason in found:
            if fail_request(self._broker, request_id, reason="generation_failed", detail=reason):
                self._say("failed for good", request_id, f"job {job_id}: {reason}")
                self._metrics.on_failed("generation_failed")
            self._failed_jobs.add(job_id)
