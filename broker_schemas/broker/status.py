"""One look at a run: lengths, sums and versions, read in one round trip."""

from __future__ import annotations

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.errors import BrokerFull
from broker_schemas.records.run_status import OpenStep, RunStatus

__all__ = ["OpenStep", "RunStatus", "read_status"]


def read_status(broker: Broker, world_size: int, *, with_ready_versions: bool = False) -> RunStatus:
    """Return the state of the run; raises BrokerError.

    It is that of one moment, but where a server before Redis 7 is at its memory limit: it refuses MULTI then.
    """
    try:
        return _read_status(broker, world_size, with_ready_versions=with_ready_versions, is_one_moment=True)
    except BrokerFull:
        return _read_status(broker, world_size, with_ready_versions=with_ready_versions, is_one_moment=False)


def _read_status(
    broker: Broker, world_size: int, *, with_ready_versions: bool, is_one_moment: bool
) -> RunStatus:
    keys = broker.keys
    with broker_errors("reading the run's status"):
        # as separate moments, a record that moves meanwhile counts twice or never
        pipe = broker.client.pipeline(transaction=is_one_moment)
        pipe.hget(keys.named("policy"), "version")
        pipe.xlen(keys.named("segments"))
        pipe.xlen(keys.named("matched"))
        pipe.zcard(keys.named("claims"))
        pipe.hgetall(keys.named("counters"))
        pipe.hgetall(keys.named("open_step"))
        pipe.hget(keys.named("dispatch"), "advice")
        for rank in range(world_size):
            pipe.xlen(keys.ready(rank))
        for rank in range(world_size if with_ready_versions else 0):
            pipe.zrange(keys.ready_versions(rank), 0, -1, withscores=True)
        version, segments, matched, claims, counters, open_step, advice, *ready = pipe.execute()
    depths, packs = ready[:world_size], ready[world_size:]
    return RunStatus(
        policy_version=int(version) if version is not None else -1,
        ready_depths=tuple(int(depth) for depth in depths),
        segments_waiting=int(segments),
        matched_waiting=int(matched),
        open_claims=int(claims),
        counters={name.decode(): int(value) for name, value in counters.items()},
        open_step=OpenStep(**{name.decode(): int(value) for name, value in open_step.items()})
        if open_step
        else None,
        ready_versions=tuple(tuple(int(version) for _, version in entries) for entries in packs),
        demand_advice=(advice or b"").decode(),
    )
