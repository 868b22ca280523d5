"""A packer that runs says so when its packs leave underfilled [P-5]."""

from __future__ import annotations

import logging

import pytest
from prometheus_client import CollectorRegistry

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.packer_door import PackerDoor
from broker_schemas.client import SegmentSink
from consumers.metrics import PackerMetrics
from consumers.pack_buffer import PackBufferSettings
from consumers.streaming_packer import StreamingPacker, StreamingPackerSettings
from tests.builders.records import a_rollout
from tests.contract.test_transitions import match_all


@pytest.mark.req("P-5", "P-11")
def test_a_pack_below_the_fill_ratio_leaves_and_the_packer_warns(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    registry = CollectorRegistry()
    buffer = PackBufferSettings(capacity_tokens=1000, packing_buffer=8, min_fill_ratio=0.65, method="exact")
    settings = StreamingPackerSettings(
        buffer=buffer, world_size=1, packs_per_rank=1, queue_limit=4, version_window=2, block_ms=1
    )
    packer = StreamingPacker(PackerDoor(broker), PackerMetrics(registry), settings)
    SegmentSink(broker).push([a_rollout("a")])
    match_all(broker, num_tokens=20)

    with caplog.at_level(logging.WARNING, logger="consumers"):
        num_packs = sum(packer.step(now_s) for now_s in (0.0, 1.0, 10.0))

    assert num_packs == 1
    assert "pack p.a left at fill 0.02 (forced), below training.packing_min_fill_ratio 0.65" in caplog.text
    assert registry.get_sample_value("rollstream_underfilled_packs_total") == 1
    assert registry.get_sample_value("rollstream_pack_buffer_segments") == 0
