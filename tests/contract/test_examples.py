"""The examples of docs/examples do what they say, on a real server."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.matcher_door import MatcherDoor
from broker_schemas.broker.policy import publish_policy, read_policy
from broker_schemas.broker.status import read_status
from broker_schemas.records.records import SegmentRecord
from rollstream.history.audit import take_audit
from tests.contract.test_transitions import match_all, pack_all

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.req("Q-3", "Q-4")
def test_a_sampler_pushes_rollouts_of_the_current_policy_once(real_broker: Broker) -> None:
    publish_policy(real_broker, policy_version=3, optimizer_step=2, weights_path="/w")
    example = load_example("push_from_sampler")

    assert example.push_rollouts(real_broker, 20) == {"ok": 20}
    assert example.push_rollouts(real_broker, 20) == {"duplicate": 20}

    entries = MatcherDoor(real_broker, "m-0").read(count=100, block_ms=1)
    records = [SegmentRecord.decode_body(entry.body, entry.schema_version) for entry in entries]
    assert [record.record_id for record in records] == [f"sampler-3-{index}" for index in range(20)]
    assert {record.policy_version for record in records} == {3}
    np.testing.assert_array_equal(records[0].response_token_ids, np.arange(40, 60))


@pytest.mark.req("Q-8", "Q-10", "Q-14")
def test_a_plain_loop_trains_from_packs_and_everything_is_accounted_for(real_broker: Broker) -> None:
    """Given twelve rollouts in packs of one, when it takes three steps of two packs, half is trained."""
    load_example("push_from_sampler").push_rollouts(real_broker, 12)
    match_all(real_broker)
    pack_all(real_broker, [0] * 12, queue_limit=0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(40, 8), torch.nn.Linear(8, 40))

    losses = load_example("train_from_packs").train(real_broker, model, num_steps=3)

    assert len(losses) == 3
    assert losses[2] < losses[0]
    status = read_status(real_broker, 1)
    assert (status.ready_depths, status.open_claims) == ((6,), 0)
    audit = take_audit(read_events(real_broker), counters=dict(status.counters))
    assert audit.balanced, audit.faults
    assert (audit.trained, audit.in_flight["packed"]) == (6, 6)
    policy = read_policy(real_broker)
    assert policy is not None
    assert policy.policy_version == 3
