"""How PipelineRL brings records through Redis: one XADD a record, one XREAD for each, nothing acknowledged.

After `pipelinerl/streams.py` of ServiceNow/PipelineRL: an index and the data in an entry, a stream that keeps
its last million entries, a reader that goes on from the last id, an entry at a time. Where it pickles plain
lists they are msgpack here: as many bytes, read as fast, written at 0.6 of the speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgpack

from broker_schemas.broker.broker import Broker
from broker_schemas.records.records import SegmentRecord

STREAM: Final = "records"
KEPT_ENTRIES: Final = 1_000_000
BLOCK_MS: Final = 100


def plain_records(rollouts: Sequence[SegmentRecord]) -> list[dict[str, Any]]:
    """Return the rollouts as maps of plain lists, as a sampler has them there."""
    return [
        {
            "record_id": rollout.record_id,
            "sample_id": rollout.sample_id,
            "version": rollout.policy_version,
            "prompt_token_ids": rollout.prompt_token_ids.tolist(),
            "response_token_ids": rollout.response_token_ids.tolist(),
        }
        for rollout in rollouts
    ]


def write_records(broker: Broker, records: Sequence[dict[str, Any]]) -> None:
    """Write records one after the other."""
    stream = broker.keys.named(STREAM)
    for index, record in enumerate(records):
        fields: dict[Any, Any] = {"index": index, "data": msgpack.packb(record)}
        broker.client.xadd(stream, fields, maxlen=KEPT_ENTRIES, approximate=True)


def read_records(broker: Broker, num_records: int) -> None:
    """Read and decode so many records one after the other."""
    stream, last, num_read = broker.keys.named(STREAM), b"0", 0
    while num_read < num_records:
        reply: Any = broker.client.xread({stream: last}, count=1, block=BLOCK_MS)
        if not reply:
            continue
        ((last, fields),) = next(iter(reply.values()))[0] if isinstance(reply, dict) else reply[0][1]
        msgpack.unpackb(fields[b"data"])
        num_read += 1
