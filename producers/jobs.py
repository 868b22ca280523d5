"""The RQ job, its queue and its worker: one job is one rollout request, run in the worker's process [O-5].

RQ's keys are open to everyone on the server, so nothing in them is trusted: what is no job of ours is passed
over, counted and named once.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

import redis
from rq import Queue, Retry, SimpleWorker, worker_registration
from rq.exceptions import InvalidJobOperation, NoSuchJobError, StopRequested, TimeoutFormatError
from rq.job import Job
from rq.registry import FailedJobRegistry, StartedJobRegistry, clean_registries
from rq.serializers import JSONSerializer
from rq.utils import now

from broker_schemas.broker.connection import broker_errors
from broker_schemas.broker.role_loop import FIRST_PAUSE_S, LONGEST_PAUSE_S
from broker_schemas.broker.rollout_requests import RolloutRequest
from broker_schemas.broker.trouble_log import TroubleLog
from broker_schemas.errors import BrokerError, BrokerRefused, BrokerUnavailable, MalformedRecord
from producers.broken_jobs import BrokenJobs
from producers.producer import Producer

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")
JOB_FUNCTION: Final = "producers.jobs.run_request"
# fields of a job's hash that name code or places to call, or that we never write
IGNORED_FIELDS: Final = {
    *("success_callback_name", "failure_callback_name", "stopped_callback_name", "webhooks", "meta"),
    *("dependency_id", "dependency_ids", "repeats_left", "repeat_intervals", "retry_intervals", "result"),
    "exc_info",
}
# what RQ raises, its own assertions among them, for a hash that it did not write
RESTORE_ERRORS: Final = (
    *(ValueError, TypeError, KeyError, AttributeError, AssertionError),
    TimeoutFormatError,
)
FAILED_JOB_TTL_S: Final = 7 * 24 * 3600
RETRIES: Final = 2
JOB_ID: Final = re.compile(rb"[A-Za-z0-9_-]{1,300}")
# RQ names a function by its import path, so a job finds its producer here; `RolloutWorker.work_for` sets it
_PRODUCERS: dict[str, Producer] = {}


def run_request(spec: Mapping[str, Any]) -> list[str]:
    """RQ calls this with the spec of a request; returns what the broker said of each record."""
    return _PRODUCERS["this"].run(RolloutRequest.from_spec(spec))


class RolloutJob(Job):  # type: ignore[misc]
    """A job whose hash may have been written by anyone: it runs our one function or fails.

    RQ would import and call whatever function, callback or webhook the hash names.
    """

    @property
    def func(self) -> Callable[[Mapping[str, Any]], list[str]]:
        """The one function of a rollout job; raises MalformedRecord for a job that names another."""
        if self.func_name != JOB_FUNCTION or self.instance is not None:
            raise MalformedRecord(
                f"job {self.id}: got function {self.func_name!r:.80}, expected {JOB_FUNCTION}; it was not run"
            )
        return run_request

    def restore(self, raw_data: Mapping[Any, Any]) -> None:
        """Take the fields of the hash that we write ourselves.

        Raises NoSuchJobError for values that cannot be: RQ leaves the job out then, and its lease ends.
        """
        kept = {name: value for name, value in raw_data.items() if _text(name) not in IGNORED_FIELDS}
        try:
            super().restore(kept)
        except RESTORE_ERRORS as exc:
            raise NoSuchJobError(f"job {self.id}: its fields are no job ({exc})") from exc
        # the number is the writer's: a job may not come back for ever
        self.retries_left: int = min(int(self.__dict__.get("retries_left") or 0), RETRIES)


def _text(name: bytes | str) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name


class RolloutQueue(Queue):  # type: ignore[misc]
    """The queue of rollout jobs of one run; ``broken`` is told of entries that are no job."""

    broken: BrokenJobs

    @classmethod
    def dequeue_any(
        cls, queues: Sequence[RolloutQueue], timeout: int | None, connection: redis.Redis, *_: Any, **__: Any
    ) -> tuple[RolloutJob, RolloutQueue] | None:
        """Return the next job that can be read, waiting ``timeout`` s; RQ's own would end the worker."""
        (queue,) = queues
        while (moved := cls.lmove(connection, queue.key, timeout)) is not None:
            raw = moved[1]
            job = queue.readable_job(raw, "the queue")
            if job is not None:
                return job, queue
            connection.lrem(queue.intermediate_queue_key, 1, raw)
        return None

    def readable_job(self, raw: bytes, where: str) -> RolloutJob | None:
        """Return the job of an entry; None, noted, for no job id and for a hash that is none of ours."""
        if not JOB_ID.fullmatch(raw):
            self.broken.note(where, raw, "no job id")
            return None
        try:
            with wrong_types_are_no_job(raw):
                job: RolloutJob = RolloutJob.fetch(raw.decode(), self.connection, JSONSerializer)
                return job
        except (NoSuchJobError, *RESTORE_ERRORS) as exc:
            self.broken.note(where, raw, str(exc) or type(exc).__name__)
            return None

    def waiting_job_ids(self) -> set[str]:
        """Return the ids of jobs that no worker has taken yet. Raises BrokerError."""
        with broker_errors("reading the queue of rollout jobs"):
            return {raw.decode("utf-8", "replace") for raw in self.connection.lrange(self.key, 0, -1)}

    def num_workers(self) -> int:
        """Return how many workers are known to take jobs. Raises BrokerError."""
        with broker_errors("counting rollout workers"):
            return int(RolloutWorker.count(queue=self))

    def taken_job_ids(self) -> set[str]:
        """Return the ids of jobs on their way to a worker. Raises BrokerError."""
        with broker_errors("reading the queue of rollout jobs"):
            rows = self.connection.lrange(self.intermediate_queue_key, 0, -1)
        return {raw.decode("utf-8", "replace") for raw in rows}

    def sweep(self) -> None:
        """Take entries out of RQ's lists that would end its own cleaning."""
        client, started = self.connection, StartedJobRegistry(queue=self).key
        for key in (started, FailedJobRegistry(queue=self).key):
            for raw in client.zrange(key, 0, -1):
                job_id, colon, rest = raw.partition(b":")
                has_form = bool(JOB_ID.fullmatch(rest)) if key == started else not colon
                if not has_form or self.readable_job(job_id, key) is None:
                    self.broken.note(key, raw, "no entry of this registry")
                    client.zrem(key, raw)
        for raw in client.lrange(self.intermediate_queue_key, 0, -1):
            if self.readable_job(raw, self.intermediate_queue_key) is None:
                client.lrem(self.intermediate_queue_key, 1, raw)


@contextmanager
def wrong_types_are_no_job(job_id: bytes) -> Iterator[None]:
    """Turn the server's complaint about a key of another type into NoSuchJobError."""
    try:
        yield
    except redis.exceptions.ResponseError as exc:
        if "WRONGTYPE" not in str(exc):
            raise
        raise NoSuchJobError(f"a key of job {job_id!r:.80} is of another type") from exc


def rollout_queue(client: redis.Redis, name: str, broken: BrokenJobs | None = None) -> RolloutQueue:
    """Return the queue of rollout jobs: JSON, never pickle; they run our one function and nothing else."""
    queue = RolloutQueue(name, connection=client, serializer=JSONSerializer, job_class=RolloutJob)
    queue.broken = broken or BrokenJobs()
    return queue


def job_id_of(request_id: str, attempt: int) -> str:
    """Return the id of the job of one attempt of a request."""
    return request_id if attempt == 1 else f"{request_id}_attempt{attempt}"


def enqueue_request(queue: Queue, request: RolloutRequest, *, attempt: int, job_timeout_s: int) -> None:
    """Enqueue a request under an id of its own, so that enqueuing twice is harmless; raises BrokerError."""
    job_id = job_id_of(request.request_id, attempt)

    def enqueue() -> None:
        with (
            broker_errors(f"enqueuing request {request.request_id}"),
            wrong_types_are_no_job(job_id.encode()),
        ):
            queue.enqueue(
                JOB_FUNCTION,
                request.to_spec(),
                job_id=job_id,
                job_timeout=job_timeout_s,
                result_ttl=60,
                failure_ttl=FAILED_JOB_TTL_S,
                retry=Retry(max=RETRIES),
                description=f"{len(request.samples)} rollouts of {request.request_id}",
                # a round is asked for chunk by chunk, at a pace of its own: each need not wait for training
                at_front=request.purpose == "evaluation",
            )

    try:
        enqueue()
    except NoSuchJobError:
        # somebody's key stands where the job's hash belongs
        with broker_errors(f"clearing the job of request {request.request_id}"):
            queue.connection.delete(f"rq:job:{job_id}")
        enqueue()


def failed_requests(queue: RolloutQueue, known: Collection[str] = ()) -> list[tuple[str, str, str]]:
    """Return (request id, job id, last line of its error) of jobs that failed for good; they stay in RQ.

    Jobs in ``known`` are left out. An entry without a readable job is taken out of the registry.
    """
    with broker_errors("reading failed jobs"):
        registry = FailedJobRegistry(queue=queue)
        registry.cleanup()
        found = []
        for raw in queue.connection.zrange(registry.key, 0, -1):
            if (job_id := raw.decode("utf-8", "replace")) in known:
                continue
            job = queue.readable_job(raw, "the failed jobs")
            if job is None:
                queue.connection.zrem(registry.key, raw)
                continue
            found.append((job_id.partition("_attempt")[0], job_id, _last_line_of_error(job)))
        return found


def _last_line_of_error(job: RolloutJob) -> str:
    try:
        with wrong_types_are_no_job(job.id.encode()):
            result = job.latest_result()
        trace = (result.exc_string if result is not None else "") or ""
    except (NoSuchJobError, *RESTORE_ERRORS):
        trace = ""
    return (trace.strip() or "no reason recorded").splitlines()[-1]


class RolloutWorker(SimpleWorker):  # type: ignore[misc]
    """An RQ worker that loads its model once and runs its jobs in its own process.

    ``job_timeout_s`` bounds every job, whatever its hash says; None leaves it to the hash.
    """

    queue_class = RolloutQueue
    job_timeout_s: int | None = None
    refusal: BrokerRefused | None = None

    @classmethod
    def work_for(
        cls, producer: Producer, client: redis.Redis, queue_name: str, broken: BrokenJobs | None = None
    ) -> None:
        """Run jobs until a signal asks to stop; the job in hand is finished first."""
        _PRODUCERS["this"] = producer
        worker = cls(
            [rollout_queue(client, queue_name, broken)],
            connection=client,
            serializer=JSONSerializer,
            job_class=RolloutJob,
            # a killed worker keeps its name for as long as its job might take
            name=f"{producer.settings.name}-{secrets.token_hex(4)}",
            worker_ttl=60,
        )
        producer.is_stopping = lambda: bool(worker._stop_requested)
        worker.job_timeout_s = producer.settings.job_timeout_s
        worker.max_connection_wait_time = LONGEST_PAUSE_S
        worker.work(logging_level="WARNING", with_scheduler=False)
        if worker.refusal is not None:
            raise worker.refusal
        if worker._shutdown_requested_date is None:
            raise BrokerUnavailable("rollout jobs: the worker ended by itself, the lines above say why")

    def register_birth(self) -> None:
        """Say that the worker is there, once the broker takes it."""
        self._patiently(super().register_birth)

    def subscribe(self) -> None:
        """Listen to the worker's channel, once the broker is there."""
        self._patiently(super().subscribe)

    def set_state(self, *args: Any, **kwargs: Any) -> None:
        """Note what the worker does, for those who look; nothing depends on it."""
        with suppress(redis.exceptions.RedisError):
            super().set_state(*args, **kwargs)

    def register_death(self) -> None:
        """Say that the worker is gone; where nobody hears it, its key ends by itself."""
        with suppress(redis.exceptions.RedisError):
            super().register_death()

    def heartbeat(self, *args: Any, **kwargs: Any) -> None:
        """Say that the worker lives; a broker that takes no writes now hears the next one."""
        with suppress(redis.exceptions.RedisError):
            super().heartbeat(*args, **kwargs)

    def check_for_suspension(self, burst: bool) -> None:
        self._patiently(lambda: super(RolloutWorker, self).check_for_suspension(burst))

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[RolloutJob, RolloutQueue] | None:
        """Wait for a job, also while the broker is away or full: RQ's own would end the worker."""
        job: tuple[RolloutJob, RolloutQueue] | None = self._patiently(
            lambda: super(RolloutWorker, self).dequeue_job_and_maintain_ttl(timeout, max_idle_time)
        )
        return job

    def _patiently(self, ask: Callable[[], Answer]) -> Answer:
        pause_s, trouble = FIRST_PAUSE_S, TroubleLog(log, "producer: rollout jobs")
        while True:
            try:
                with broker_errors("asking for a rollout job"):
                    answer = ask()
            except BrokerRefused as exc:
                self.refusal = exc
                raise StopRequested from exc
            except BrokerError as exc:
                trouble.on_trouble(exc)
            else:
                trouble.on_well()
                return answer
            if self._stop_requested:
                raise StopRequested
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def execute_job(self, job: RolloutJob, queue: RolloutQueue) -> None:
        """Run one job; one whose own keys cannot be used is left out.

        Where the broker does not take RQ's own notes of a job, the request's lease says what becomes of it.
        """
        if self.job_timeout_s is not None:
            job.timeout = self.job_timeout_s
        try:
            with wrong_types_are_no_job(job.id.encode()):
                super().execute_job(job, queue)
        except redis.exceptions.RedisError as exc:
            log.warning("producer: job %s could not be noted (%s); its lease ends by itself", job.id, exc)
            time.sleep(FIRST_PAUSE_S)
        except (NoSuchJobError, InvalidJobOperation, *RESTORE_ERRORS) as exc:
            queue.broken.note("the queue", job.id.encode(), str(exc) or type(exc).__name__)
            self.connection.lrem(queue.intermediate_queue_key, 1, job.id)

    def run_maintenance_tasks(self) -> None:
        """Clean this queue's registries; RQ's own stops at the first entry that is no job."""
        self.last_cleaned_at = now()
        with suppress(redis.exceptions.RedisError):  # a broker that is away or full: the next time
            self._clean_queues()

    def _clean_queues(self) -> None:
        for queue in self.queues:
            if not queue.acquire_maintenance_lock():
                continue
            try:
                with wrong_types_are_no_job(queue.name.encode()):
                    queue.sweep()
                    clean_registries(queue, self._exc_handlers)
                    worker_registration.clean_worker_registry(queue)
                    queue.intermediate_queue.cleanup(self, queue)
            except (NoSuchJobError, *RESTORE_ERRORS) as exc:
                queue.broken.note("the registries", queue.name.encode(), str(exc) or type(exc).__name__)
            finally:
                queue.release_maintenance_lock()
