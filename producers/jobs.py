"""The RQ job and its worker: one job is one rollout request, run in the worker's own process [O-5]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import redis
from rq import Queue, Retry, SimpleWorker
from rq.exceptions import NoSuchJobError, TimeoutFormatError
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from broker_schemas.broker.connection import broker_errors
from broker_schemas.broker.rollout_requests import RolloutRequest
from broker_schemas.errors import MalformedRecord
from producers.producer import Producer

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


def _text(name: bytes | str) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name


def rollout_queue(client: redis.Redis, name: str) -> Queue:
    """Return the queue of rollout jobs: JSON, never pickle; they run our one function and nothing else."""
    return Queue(name, connection=client, serializer=JSONSerializer, job_class=RolloutJob)


def enqueue_request(queue: Queue, request: RolloutRequest, *, attempt: int, job_timeout_s: int) -> None:
    """Enqueue a request under an id of its own, so that enqueuing twice is harmless; raises BrokerError."""
    job_id = request.request_id if attempt == 1 else f"{request.request_id}_attempt{attempt}"
    with broker_errors(f"enqueuing request {request.request_id}"):
        queue.enqueue(
            JOB_FUNCTION,
            request.to_spec(),
            job_id=job_id,
            job_timeout=job_timeout_s,
            result_ttl=60,
            failure_ttl=FAILED_JOB_TTL_S,
            retry=Retry(max=2),
            description=f"{len(request.samples)} rollouts of {request.request_id}",
        )


def failed_requests(queue: Queue, *, at_most: int = 64) -> list[tuple[str, str, str]]:
    """Return (request id, job id, last line of its error) of jobs that failed for good; they stay in RQ."""
    with broker_errors("reading failed jobs"):
        registry = FailedJobRegistry(queue=queue)
        found = []
        for job_id in registry.get_job_ids(-at_most, -1):
            job = RolloutJob.fetch(job_id, connection=queue.connection, serializer=JSONSerializer)
            result = job.latest_result()
            trace = (result.exc_string if result is not None else "") or "no reason recorded"
            found.append((job_id.partition("_attempt")[0], job_id, trace.strip().splitlines()[-1]))
        return found


class RolloutWorker(SimpleWorker):  # type: ignore[misc]
    """An RQ worker that loads its model once and runs its jobs in its own process."""

    @classmethod
    def work_for(cls, producer: Producer, client: redis.Redis, queue_name: str) -> None:
        """Run jobs until a signal asks to stop; the job in hand is finished first."""
        _PRODUCERS["this"] = producer
        worker = cls(
            [rollout_queue(client, queue_name)],
            connection=client,
            serializer=JSONSerializer,
            job_class=RolloutJob,
            name=producer.settings.name,
            worker_ttl=60,
        )
        worker.work(logging_level="WARNING", with_scheduler=False)
