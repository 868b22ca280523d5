"""A run has one past: what decides it cannot change on the way, what may change is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.run_identity import adopt_run, read_deciding
from broker_schemas.errors import ConfigError
from broker_schemas.records.identity import RunIdentity, going_on, max_steps_course
from broker_schemas.records.ledger import Ledger

DECIDING = {"run.seed": "0", "training.learning_rate": "0.001", "devices.learner_world_size": "2"}
SETTINGS = {"training.max_steps": "10", "producers.num_workers": "1"}
RUN = RunIdentity(run_id="a" * 32, deciding=DECIDING, settings=SETTINGS)


@pytest.mark.req("Q-18")
def test_every_deciding_value_that_differs_is_named_with_old_and_new() -> None:
    other = {**DECIDING, "devices.learner_world_size": "1", "training.learning_rate": "0.01"}

    with pytest.raises(ConfigError) as refused:
        going_on(RUN, other, SETTINGS, optimizer_step=4)

    assert "devices.learner_world_size: began with 2, got 1" in str(refused.value)
    assert "training.learning_rate: began with 0.001, got 0.01" in str(refused.value)
    assert "run.seed" not in str(refused.value)


@pytest.mark.req("Q-18")
def test_what_may_change_is_recorded_with_its_step_and_said_again_it_is_no_change() -> None:
    longer = {**SETTINGS, "training.max_steps": "20"}

    changed = going_on(RUN, DECIDING, longer, optimizer_step=10)
    again = going_on(changed, DECIDING, longer, optimizer_step=15)
    back = going_on(changed, DECIDING, SETTINGS, optimizer_step=16)

    assert again == changed
    assert max_steps_course(RUN) == ((0, 10),)
    assert max_steps_course(changed) == ((0, 10), (10, 20))
    assert max_steps_course(back) == ((0, 10), (10, 20), (16, 10))
    assert RunIdentity.from_json(json.loads(json.dumps(back.to_json()))) == back


@pytest.mark.req("Q-18")
def test_the_name_of_a_run_belongs_to_the_first_that_came(broker: Broker, tmp_path: Path) -> None:
    """Given two people with one run name and two folders on one broker."""
    adopt_run(broker, RUN, tmp_path / "first", optimizer_step=0)
    adopt_run(broker, RUN, tmp_path / "first", optimizer_step=0)
    other = RunIdentity(run_id="b" * 32, deciding=DECIDING, settings=SETTINGS)

    with pytest.raises(ConfigError, match=f"another run of this name, {'a' * 32}, of .*first") as refused:
        adopt_run(broker, other, tmp_path / "second", optimizer_step=0)

    assert "second" in str(refused.value)
    assert read_deciding(broker) == DECIDING


@pytest.mark.req("Q-18")
def test_another_past_of_the_same_run_is_refused_by_the_broker_too(broker: Broker, tmp_path: Path) -> None:
    adopt_run(broker, RUN, tmp_path, optimizer_step=0)
    other = RunIdentity(run_id=RUN.run_id, deciding={**DECIDING, "run.seed": "1"}, settings=SETTINGS)

    with pytest.raises(ConfigError, match="run.seed: began with 0, got 1"):
        adopt_run(broker, other, tmp_path, optimizer_step=0)


@pytest.mark.req("Q-18", "Q-2")
def test_a_change_of_settings_is_an_event_once(broker: Broker, tmp_path: Path) -> None:
    adopt_run(broker, RUN, tmp_path, optimizer_step=0)
    changed = going_on(RUN, DECIDING, {**SETTINGS, "training.max_steps": "20"}, optimizer_step=10)
    for _ in range(2):
        adopt_run(broker, changed, tmp_path, optimizer_step=10)

    events = list(read_events(broker))

    assert [event.kind for event in events] == ["run_adopted", "settings_changed"]
    assert events[1].number("optimizer_step") == 10
    assert json.loads(events[1].text("changes")) == {"training.max_steps": ["10", "20"]}
    assert Ledger().apply(events).faults == []
