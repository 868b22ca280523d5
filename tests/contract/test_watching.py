"""`rollstream top` and `report` on a run that nobody started with `up`: broker or archive tell."""

from __future__ import annotations

import io
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from rich.console import Console

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.evaluation_rounds import settle_evaluation
from broker_schemas.broker.learner_door import LearnerDoor
from broker_schemas.broker.lease import Lease
from broker_schemas.broker.policy import publish_policy
from broker_schemas.errors import BrokerRefused, ConfigError
from broker_schemas.records.evaluation_state import ROUND_SPAN, EvaluationNumbers
from rollstream.commands.program import main
from rollstream.history.archive import ArchiveWriter
from rollstream.run_folder import RunFolder
from rollstream.watch.broker_follower import now_ms
from rollstream.watch.live_table import LiveView
from rollstream.watch.watched_run import find_run
from rollstream.watch.watching import live_view
from tests.builders.settings import claim_settings
from tests.contract.test_transitions import match_all, pack_all, push
from tests.redis_servers import program_or_skip, running_server

CONFIG = """
run: {{name: watched, output_dir: {output}}}
broker: {{url: "{url}"}}
data: {{train_jsonl: none.jsonl}}
model: {{name_or_path: none}}
custom: {{trainer_variant: stage2_async}}
stage2_ab: {{schedule: {{b_ratio: 0.5}}}}
training: {{max_steps: 60, effective_batch_size: 4, per_device_train_batch_size: 2, global_max_length: 4096}}
devices: {{learner_world_size: 2}}
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """The URL and the process id of a server of the test's own: it is frozen and thawed."""
    with running_server(program_or_skip(), ["--port", "0"], tmp_path / "redis.log") as socket:
        url = f"unix://{socket}"
        with redis.Redis.from_url(url) as client:
            yield url, int(client.info("server")["process_id"])


@pytest.fixture
def config(tmp_path: Path, server: tuple[str, int]) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG.format(output=tmp_path / "runs", url=server[0]), encoding="utf-8")
    return path


def a_run(url: str) -> Broker:
    """Two rollouts are on their way and one step is trained, by roles that nobody of this machine started."""
    broker = Broker.connect("watched", BrokerAddress(url=url))
    for role in ("learner", "packer"):
        Lease.take(broker, role, lease_ms=60_000)
    publish_policy(broker, policy_version=0, optimizer_step=0, weights_path="w")
    push(broker, "a", "b")
    match_all(broker)
    pack_all(broker, [1, 1])
    door = LearnerDoor(
        broker, claim_settings(world_size=2, packs_per_rank=1, version_window=2, mode="fallback")
    )
    door.claim_step(optimizer_step=0, scheduled_kind="A", policy_version=0)
    door.commit_step(optimizer_step=0, summary={"kind": "A", "reason": "schedule", "loss": 1.375})
    push(broker, "c")
    return broker


def shown(view: LiveView, *, coloured: bool = False) -> str:
    stream = io.StringIO()
    console = Console(
        width=100, file=stream, color_system="standard" if coloured else None, force_terminal=coloured
    )
    console.print(view.render(now_ms()))
    return stream.getvalue()


@pytest.mark.req("O-1", "O-3")
def test_a_configuration_alone_shows_queue_steps_and_who_is_there(
    server: tuple[str, int], config: Path
) -> None:
    a_run(server[0]).close()

    with live_view(find_run(config)) as view:
        text = shown(view)

    assert "watched · stage2_async" in text
    assert "step 1 of 60" in text
    assert re.search(r"0 +0 +1 +0 +0 2 \(limit \d+\) +0", text), text
    assert "1.38" in text
    assert "learner ●" in text
    assert "packer ●" in text
    assert "matcher ●" in text
    assert "producer ○" in text  # none is there, and the run wants some
    assert "producer 0 is away" in text


@pytest.mark.req("O-1", "L-8")
def test_a_round_of_evaluation_and_its_evaluator_are_seen(server: tuple[str, int], config: Path) -> None:
    # given a round that has answers for two of its five, and one before it that is settled
    broker = a_run(server[0])
    Lease.take(broker, "evaluator", lease_ms=60_000)
    keys = broker.keys
    broker.client.hset(keys.named("evaluation"), mapping={"cursor": 4 * ROUND_SPAN, "settled": 0})
    numbers = EvaluationNumbers(
        optimizer_step=4, policy_version=4, highest_policy_version=4, metrics={"eval_rollout_f1": 0.625}
    )
    assert settle_evaluation(broker, numbers, num_results=0, entry_ids=())
    with live_view(find_run(config)) as view:
        settled = shown(view)
    broker.client.hset(keys.named("evaluation"), "cursor", 8 * ROUND_SPAN + 5)
    broker.client.hset(keys.named("counters"), "evaluation_open_records", 3)
    broker.close()
    # when
    with live_view(find_run(config)) as view:
        text = shown(view)
    # then
    assert "evaluation v4 F1 62.5%" in settled
    assert "evaluation of v8: 2 of 5 asked are answered  v4 F1 62.5%" in text
    assert "evaluator ●" in text


@pytest.mark.req("O-3")
def test_a_frozen_broker_is_red_within_seconds_and_green_when_it_is_back(
    server: tuple[str, int], config: Path
) -> None:
    url, pid = server
    a_run(url).close()
    with live_view(find_run(config)) as view:
        assert "does not answer" not in shown(view)
        os.kill(pid, signal.SIGSTOP)
        try:
            frozen_s = time.monotonic()
            while "does not answer" not in shown(view) and time.monotonic() < frozen_s + 30:
                time.sleep(0.1)
            took_s = time.monotonic() - frozen_s
            assert re.search(r"\x1b\[1;31m▲ the broker does not answer for \d", shown(view, coloured=True))
            assert took_s < 6
        finally:
            os.kill(pid, signal.SIGCONT)
        thawed_s = time.monotonic()
        while "does not answer" in shown(view) and time.monotonic() < thawed_s + 30:
            time.sleep(0.1)
        assert "does not answer" not in shown(view)


def test_a_broker_that_is_not_there_is_said_at_once_and_one_that_refuses_ends_it(
    tmp_path: Path, config: Path
) -> None:
    with live_view(find_run(config, f"unix://{tmp_path}/nowhere.sock")) as view:
        assert "the broker does not answer: " in shown(view)
    program = program_or_skip()
    with running_server(program, ["--port", "0", "--requirepass", "x"], tmp_path / "locked.log") as locked:
        run = find_run(config, f"unix://{locked}")
        with pytest.raises(BrokerRefused), live_view(run):
            pass


def test_once_the_broker_is_gone_the_archive_tells_the_same(
    server: tuple[str, int], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = a_run(server[0])
    folder = RunFolder(tmp_path / "runs" / "watched")
    archive = ArchiveWriter(broker, folder.archive_dir)
    while archive.step(block_ms=1):
        pass
    archive.close()
    with live_view(find_run(config)) as view:
        live = flow_of(shown(view))
    broker.client.flushall()
    broker.close()

    with live_view(find_run(config)) as view:
        text = shown(view)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(config)])

    assert flow_of(text) == live
    assert "no stack runs" in text
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert folder.report.exists()
    assert "stack_samples" not in said
    assert "neither an archive" not in said


def flow_of(text: str) -> str:
    return next(line for line in text.splitlines() if "(limit" in line)


def test_nothing_to_see_is_said_with_what_to_do(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "other"
    (folder / "logs").mkdir(parents=True)
    with pytest.raises(ConfigError, match="--broker redis://"), live_view(find_run(folder)):
        pass
    with pytest.raises(ConfigError, match="not found"):
        find_run(tmp_path / "none")
