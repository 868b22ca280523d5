"""The supervisor of ``rollstream up`` with fake roles on a real embedded Redis: nothing is left behind."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from broker_schemas.errors import BrokerRefused, BrokerUnavailable, ConfigError, DataError
from configs import load_config
from rollstream.stack.embedded_redis import EmbeddedRedis
from rollstream.stack.ports_in_use import free_loopback_port
from rollstream.stack.running import StackOptions, run_stack
from tests.builders.configs import PROJECT_ROOT
from tests.e2e.stack_driver import FakeStack

NUM_SERVING = 5  # archive, packer, dispatcher, matcher, producer
END_DEADLINE_S = 60


def finishing(**behaviours: list[str]) -> dict[str, list[str]]:
    return {"learner": ["finish_after", str(NUM_SERVING)]} | behaviours


def announcing(folder: Path, *, rank: str) -> FakeStack:
    """Return a stack whose learner has one rank, and tells the test when everyone is up."""
    words = ["announce", str(NUM_SERVING + 1), rank]
    return FakeStack(folder, {"learner": words}).with_announcement()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def assert_nothing_is_left(stack: FakeStack) -> None:
    assert [pid for pid in stack.pids() if is_running(pid)] == []
    assert len(stack.pids()) >= NUM_SERVING
    pids = [role["pid"] for sample in stack.samples() for role in sample["roles"] if role["pid"]]
    assert [pid for pid in pids if is_running(pid)] == []


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    """Programs that a test starts; what still runs at its end is killed."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.req("O-2")
def test_a_stack_ends_when_the_learner_is_done_and_the_archive_goes_last(tmp_path: Path) -> None:
    # given roles that serve, and a learner that is done once all of them are up
    stack = FakeStack(tmp_path, finishing())
    # when
    result, _ = stack.run()
    # then
    assert (result.exit_status, result.reason) == (0, "")
    stopped = [line for line in stack.diary() if line.endswith("stopped")]
    assert sorted(stopped) == [
        f"{role} 0 stopped" for role in ("archive", "dispatcher", "matcher", "packer", "producer")
    ]
    assert stopped[-1] == "archive 0 stopped"
    assert_nothing_is_left(stack)
    # and the folder tells of it
    last = stack.samples()[-1]
    assert {role["role"]: role["state"] for role in last["roles"]} == {
        "broker": "running",
        **dict.fromkeys(("archive", "dispatcher", "matcher", "packer", "producer", "learner"), "done"),
    }
    assert last["ready_depth"] == [0, 0]
    assert last["broker_bytes"] > 0
    assert stack.folder.resolved_config.exists()
    assert not stack.folder.broker.exists()
    assert sorted(path.name for path in stack.folder.logs_dir.iterdir()) == [
        f"{role}-0.log" for role in ("archive", "dispatcher", "learner", "matcher", "packer", "producer")
    ]


@pytest.mark.req("Q-20")
@pytest.mark.parametrize("how", ["renamed", "removed"])
def test_a_run_folder_that_goes_while_the_stack_writes_is_no_success(
    tmp_path: Path, how: str, children: list[subprocess.Popen[str]]
) -> None:
    stack = announcing(tmp_path, rank="serve")
    children.append(stack.start())
    stack.wait_for("up")
    if how == "renamed":
        stack.folder.path.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(stack.folder.path)

    said, _ = children[0].communicate(timeout=END_DEADLINE_S)

    assert children[0].returncode == 3
    assert "moved, replaced or removed" in json.loads(said)["reason"]
    assert [pid for pid in stack.pids() if is_running(pid)] == []


def test_numbers_of_the_command_line_reach_the_plan_and_every_process(tmp_path: Path) -> None:
    stack = FakeStack(tmp_path, {"learner": ["finish_after", "8"]})
    result, _ = stack.run(producers=3, matchers=2, steps=7)
    assert result.exit_status == 0
    names = {line.partition(" began ")[0] for line in stack.diary() if " began " in line}
    assert {"producer 0", "producer 1", "producer 2", "matcher 0", "matcher 1"} <= names
    assert "max_steps: 7" in stack.folder.resolved_config.read_text(encoding="utf-8")


def test_a_role_that_dies_twice_is_reported_and_started_again(tmp_path: Path) -> None:
    # given
    stack = FakeStack(tmp_path, finishing(producer=["die", "2"]))
    # when
    result, seen = stack.run()
    # then
    assert result.exit_status == 0
    assert seen.count("producer 0 died (status 7); starting it again in") == 2
    rows = {role["role"]: role for role in stack.samples()[-1]["roles"]}
    assert (rows["producer"]["restarts"], rows["matcher"]["restarts"]) == (2, 0)
    assert_nothing_is_left(stack)


def test_a_learner_that_dies_is_started_again(tmp_path: Path) -> None:
    # given a learner that dies once and is then replaced by one that is done
    stack = FakeStack(tmp_path, {"learner": ["die_then_finish", str(NUM_SERVING)]})
    result, seen = stack.run()
    assert (result.exit_status, result.reason) == (0, "")
    assert "learner 0 died (status 7)" in seen


def test_a_role_that_dies_repeatedly_stops_the_stack_with_its_last_lines(tmp_path: Path) -> None:
    # given
    stack = FakeStack(tmp_path, {"matcher": ["die", "99"]})
    # when
    result, _ = stack.run()
    # then
    assert result.exit_status == 3
    assert "matcher 0 died 5 times in a row, the last time with status 7" in result.reason
    assert result.reason.endswith("boom of matcher 0")
    assert sum(line.startswith("matcher 0 began") for line in stack.diary()) == 5
    assert_nothing_is_left(stack)


@pytest.mark.parametrize("role", ["producer", "learner"])
@pytest.mark.parametrize("exit_status", [2, 3])
def test_a_role_that_refuses_stops_the_stack_at_once_with_its_message(
    tmp_path: Path, role: str, exit_status: int
) -> None:
    # given
    stack = FakeStack(tmp_path, {role: ["refuse", str(exit_status)]})
    # when
    result, seen = stack.run()
    # then it was not started again
    assert result.exit_status == exit_status
    assert f"{role} 0 stops the stack: train.jsonl:3: no field 'objects'\n  write it\n" in result.reason
    assert "starting it again" not in seen
    pids = stack.pids()
    assert pids
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.req("O-2")
@pytest.mark.parametrize("number, exit_status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_stops_everything_in_order_and_the_ranks_may_say_goodbye(
    tmp_path: Path, children: list[subprocess.Popen[str]], number: signal.Signals, exit_status: int
) -> None:
    # given a running stack, whose learner has a rank in a session of its own
    stack = announcing(tmp_path, rank="serve")
    process = stack.start()
    children.append(process)
    stack.wait_for("up")
    # when
    process.send_signal(number)
    output, errors = process.communicate(timeout=END_DEADLINE_S)
    # then
    assert process.returncode == exit_status, errors
    assert "the same command goes on" in json.loads(output)["reason"]
    assert "rank 0 stopped" in stack.diary()
    assert stack.diary()[-1] == "archive 0 stopped"
    assert_nothing_is_left(stack)


def test_a_second_signal_kills_what_does_not_end(
    tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    # given a rank that ignores SIGTERM
    stack = announcing(tmp_path, rank="stubborn")
    process = stack.start()
    children.append(process)
    stack.wait_for("up")
    # when
    process.send_signal(signal.SIGINT)
    stack.wait_for("asked to end")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    # then
    assert process.returncode == 130, errors
    assert "killed by a second signal" in json.loads(output)["reason"]
    assert_nothing_is_left(stack)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds processes to their parent")
def test_no_process_outlives_a_supervisor_that_is_killed(
    tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    # given
    stack = announcing(tmp_path, rank="stubborn")
    process = stack.start()
    children.append(process)
    stack.wait_for("up")
    broker_pid = json.loads(stack.folder.broker.read_text(encoding="utf-8"))["pid"]
    watched = [os.pidfd_open(pid) for pid in (*stack.pids(), broker_pid)]
    assert len(watched) == NUM_SERVING + 3
    # when
    process.kill()
    # then the kernel ends all of them, ranks and broker included
    for handle in watched:
        ended, _, _ = select.select([handle], [], [], 20)
        os.close(handle)
        assert ended


@pytest.mark.req("Q-1")
def test_a_second_run_in_the_same_folder_finds_what_the_first_one_left_in_the_broker(tmp_path: Path) -> None:
    # given
    stack = FakeStack(tmp_path, {"learner": ["remember", str(NUM_SERVING)]})
    # when
    results = [stack.run()[0].exit_status for _ in range(2)]
    # then
    assert results == [0, 0]
    assert [line for line in stack.diary() if "run number" in line] == [
        "learner 0 run number 1",
        "learner 0 run number 2",
    ]


def test_a_second_stack_in_the_same_folder_is_refused_while_the_first_one_runs(
    tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    # given
    stack = announcing(tmp_path, rank="serve")
    process = stack.start()
    children.append(process)
    stack.wait_for("up")
    began = len(stack.pids())
    # when
    with pytest.raises(ConfigError, match=rf"in use by another stack, process {process.pid}; .*stop it"):
        stack.run()
    # then it started nothing, and the first one goes on
    assert len(stack.pids()) == began
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=END_DEADLINE_S)
    assert process.returncode == 143


@pytest.mark.req("Q-1")
def test_a_broker_that_is_killed_comes_back_on_its_port_with_what_it_held(tmp_path: Path) -> None:
    # given a learner that kills the broker
    stack = FakeStack(tmp_path, {"learner": ["kill_broker", str(NUM_SERVING)]})
    # when
    result, seen = stack.run()
    # then
    assert (result.exit_status, result.reason) == (0, "")
    assert "broker 0 died (signal 9); starting it again" in seen
    assert "learner 0 kept b'yes'" in stack.diary()
    rows = {role["role"]: role for role in stack.samples()[-1]["roles"]}
    assert (rows["broker"]["restarts"], rows["broker"]["state"]) == (1, "running")
    assert_nothing_is_left(stack)


def refusal(stack: FakeStack, kind: type[Exception]) -> str:
    """Return with which message the stack refuses to start; it must have written nothing."""
    with pytest.raises(kind) as caught:
        stack.run()
    assert not stack.folder.path.exists()
    return str(caught.value)


def test_a_broker_that_nobody_runs_is_refused_with_its_address_and_a_remedy(tmp_path: Path) -> None:
    url = f"redis://127.0.0.1:{free_loopback_port()}/0"
    message = refusal(FakeStack(tmp_path, settings={"broker__url": url}), BrokerUnavailable)
    assert url in message
    assert "start that server, correct broker.url" in message


def test_a_server_of_jobs_that_nobody_runs_is_refused_by_the_name_of_its_own_key(
    tmp_path: Path, redis_url: str
) -> None:
    jobs_url = f"redis://127.0.0.1:{free_loopback_port()}/0"
    settings = {"broker__url": redis_url, "broker__jobs_url": jobs_url}
    message = refusal(FakeStack(tmp_path, settings=settings), BrokerUnavailable)
    assert jobs_url in message
    assert "start that server, correct broker.jobs_url" in message


def test_a_broker_that_refuses_the_password_is_refused_without_showing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a server with a password, and another one in the environment
    server = EmbeddedRedis.start(tmp_path / "server", durability="none")
    client = redis.Redis.from_url(server.url)
    client.config_set("requirepass", "right")
    client.close()
    monkeypatch.setenv("SECRET", "wrong-one")
    settings: dict[str, Any] = {"broker__url": server.url, "broker__password_env": "SECRET"}
    # when
    try:
        message = refusal(FakeStack(tmp_path, settings=settings), BrokerRefused)
    finally:
        server.stop()
    # then
    assert "password" in message
    assert "wrong-one" not in message


def test_a_metrics_port_in_use_is_refused_with_its_number_and_who_wants_it(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        message = refusal(FakeStack(tmp_path, settings={"metrics__base_port": port - 20}), ConfigError)
    assert f"port {port} for dispatcher 0: Address already in use" in message
    assert "set metrics.base_port to another port" in message


def test_a_data_set_that_is_not_there_is_refused_with_its_key_and_path(tmp_path: Path) -> None:
    stack = FakeStack(tmp_path)
    path = stack.config_path
    override = "data.train_jsonl=nowhere.jsonl"
    with pytest.raises(DataError, match=r"data\.train_jsonl: no file nowhere\.jsonl; correct the path"):
        run_stack(path, load_config(path, (override,)), StackOptions(overrides=(override,)), stack.command)
    assert not stack.folder.path.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "ending, exit_status", [("_exit(0)", 0), ("_exit(3)", 3), ("kill(os.getpid(), 9)", 137)]
)
def test_torchrun_ends_with_the_status_of_the_rank_that_ended_it(ending: str, exit_status: int) -> None:
    # given two ranks that end alike
    command = [
        *(sys.executable, "-m", "rollstream.stack.learner_launcher", "--nproc_per_node", "2"),
        *("--master_addr", "127.0.0.1", "--master_port", str(free_loopback_port())),
        *("--no-python", sys.executable, "-S", "-c", f"import os; os.{ending}"),
    ]
    # when
    ended = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    # then
    assert ended.returncode == exit_status, ended.stderr
