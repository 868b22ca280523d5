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
from configs import RunConfig
from rollstream.wiring import access
from rollstream.wiring.identity import (
    adopt_on_broker,
    check_data,
    check_folder,
    settle_identity,
    warn_of_another_past,
    warn_of_model,
)
from tests.builders.configs import load_mapping, make_mapping
from tests.builders.datasets import dataset_line, write_jsonl, write_picture

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


@pytest.fixture
def config(broker: Broker, tmp_path: Path) -> RunConfig:
    """A run that its learner adopted on the broker, with data, a model and a folder of its own."""
    write_picture(tmp_path / "images" / "one.png")
    write_jsonl(tmp_path / "train.jsonl", [dataset_line()])
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (tmp_path / "model" / name).write_text("{}")
    mapping = make_mapping(
        run__name=broker.keys.run,
        run__output_dir=str(tmp_path / "runs"),
        data={"train_jsonl": str(tmp_path / "train.jsonl")},
        model__name_or_path=str(tmp_path / "model"),
    )
    config = load_mapping(tmp_path, mapping)
    adopt_on_broker(config, broker, settle_identity(config))
    return config


@pytest.mark.req("Q-18")
def test_a_role_started_by_hand_on_other_data_is_refused(config: RunConfig, broker: Broker) -> None:
    check_data(config, broker)

    write_jsonl(Path(config.data.train_jsonl), [dataset_line(), dataset_line()])

    with pytest.raises(ConfigError, match=r"data\.train_jsonl \(its contents\): began with .*, got "):
        check_data(config, broker)


@pytest.mark.req("Q-18")
def test_a_role_started_by_hand_with_another_model_is_warned(
    config: RunConfig, broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_model(config, broker)
    assert not caplog.messages

    (tmp_path / "model" / "tokenizer.json").write_text('{"added_tokens": []}')
    warn_of_model(config, broker)

    assert "is not the folder that run" in caplog.text


@pytest.mark.req("Q-18", "Q-20")
def test_a_role_that_would_write_into_another_runs_folder_is_refused(
    config: RunConfig, broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_folder(config, broker)
    assert not caplog.messages
    elsewhere = load_mapping(
        tmp_path, make_mapping(run__name=broker.keys.run, run__output_dir=str(tmp_path / "others"))
    )

    check_folder(elsewhere, broker)
    assert f"the broker holds run {settle_identity(config).run_id} of" in caplog.text

    folder = access.run_folder(elsewhere)
    folder.path.mkdir(parents=True)
    folder.identity.write_text(json.dumps(RUN.to_json()))
    with pytest.raises(ConfigError, match=f"{folder.path}, is run {RUN.run_id}"):
        check_folder(elsewhere, broker)


@pytest.mark.req("Q-18")
def test_a_role_that_only_looks_with_another_configuration_is_warned(
    config: RunConfig, broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_another_past(config, broker)
    assert not caplog.messages

    warn_of_another_past(load_mapping(tmp_path, make_mapping(run__seed=9)), broker)

    assert "run.seed: began with 0, got 9" in caplog.text
