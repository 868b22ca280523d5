"""Pushes rollouts from a sampler of your own into the queue of a run.

    python push_from_sampler.py RUN redis://127.0.0.1:6379/0

Nothing of rollstream runs here but the record and its sink; replace `sample` by your model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy as np

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.policy import read_policy
from broker_schemas.client import SegmentSink
from broker_schemas.records.records import GroundTruthObject, ImageReference, SegmentRecord

BATCH = 8


def sample(policy_version: int, num_rollouts: int) -> Iterator[SegmentRecord]:
    """Yield rollouts: prompt and response as token ids, the ground truth, and what the image was."""
    for index in range(num_rollouts):
        yield SegmentRecord(
            record_id=f"sampler-{policy_version}-{index}",  # the same rollout must always have the same id
            policy_version=policy_version,
            sample_id=f"train-{index}",
            task="bbox",
            images=(ImageReference(path=f"images/{index}.png", width=128, height=128, grid_thw=(1, 8, 8)),),
            processor_fingerprint="00112233aabbccdd",
            assistant_payload=(GroundTruthObject(desc="leaf", geometry="bbox_2d", bins=(10, 20, 300, 400)),),
            prompt_token_ids=np.arange(1, 40, dtype=np.int32),
            response_token_ids=np.arange(40, 60, dtype=np.int32),
            generated_at_ms=time.time_ns() // 1_000_000,
        )


def push_rollouts(broker: Broker, num_rollouts: int) -> dict[str, int]:
    """Push rollouts of the current policy; return how many got each status."""
    policy = read_policy(broker)
    sink, counts = SegmentSink(broker), dict[str, int]()
    waiting: list[SegmentRecord] = []
    for record in sample(policy.policy_version if policy else 0, num_rollouts):
        waiting.append(record)
        if len(waiting) == BATCH:
            _push(sink, waiting, counts)
            waiting = []
    _push(sink, waiting, counts)
    return counts


def _push(sink: SegmentSink, records: list[SegmentRecord], counts: dict[str, int]) -> None:
    # waits while the broker is full; pushing twice is harmless, the second time is a "duplicate"
    for status in sink.push_when_room(records, deadline_s=60):
        counts[status] = counts.get(status, 0) + 1


if __name__ == "__main__":
    connected = Broker.connect(sys.argv[1], BrokerAddress(url=sys.argv[2]))
    sys.stdout.write(f"{push_rollouts(connected, 32)}\n")
    connected.close()
