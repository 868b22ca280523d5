"""Who is there, as the broker knows it: holders of places, matchers that read, workers of the job queue.

The same answer wherever the roles run; how often one was started again, only its own starter knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import ResponseError

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.broker.keys import MATCHER_GROUP
from rollstream.history.log_samples import Row

if TYPE_CHECKING:
    import redis

PLACES: Final = ("archive", "packer", "dispatcher", "evaluator", "learner")
HEARD_WITHIN_MS: Final = 60_000
_WORKERS_OF_QUEUE: Final = "rq:workers:{}"


def read_presence(broker: Broker, jobs: redis.Redis, *, is_done: bool, has_rollouts: bool) -> list[Row]:
    """Return one row (role, index, state) a process; raises BrokerError.

    A place that was held and is not any more is ``away``, or ``done`` once all steps are. Of matchers and
    producers those that are there are rows, and one that is ``away`` where there is none at all.
    """
    keys = broker.keys
    with broker_errors("asking the broker who is there"):
        pipe = broker.client.pipeline(transaction=False)
        pipe.time()
        for role in PLACES:
            pipe.hget(keys.named(f"lease:{role}"), "until_ms")
        (seconds, microseconds), *leases = pipe.execute()
        num_matchers = _num_matchers(broker)
        num_workers = _num_workers(jobs, keys.rollout_queue)
    now_ms = int(seconds) * 1000 + int(microseconds) // 1000
    gone = "done" if is_done else "away"
    rows = [
        {"role": role, "index": 0, "state": "running" if int(until) > now_ms else gone}
        for role, until in zip(PLACES, leases, strict=True)
        if until is not None
    ]
    if has_rollouts:
        rows += _workers("matcher", num_matchers, gone) + _workers("producer", num_workers, gone)
    return rows


def _num_matchers(broker: Broker) -> int:
    try:
        found: Any = broker.client.xinfo_consumers(broker.keys.named("segments"), MATCHER_GROUP)
    except ResponseError as exc:  # nobody has made the stream or its group yet
        if "no such key" in str(exc) or "NOGROUP" in str(exc):
            return 0
        raise
    return sum(int(consumer["idle"]) < HEARD_WITHIN_MS for consumer in found)


def _num_workers(jobs: redis.Redis, queue: str) -> int:
    """Return how many workers of a queue are alive: the hash of one that is not expires."""
    members: Any = jobs.smembers(_WORKERS_OF_QUEUE.format(queue))
    names: Sequence[Any] = sorted(members)
    return int(jobs.exists(*names)) if names else 0


def _workers(role: str, number: int, gone: str) -> list[Row]:
    return [
        {"role": role, "index": index, "state": "running" if number else gone}
        for index in range(max(number, 1))
    ]
