"""Every command of the README and the runbook is run, in a workspace that looks like a checkout.

A command that cannot run in a test stands in NOT_RUN with its reason; nothing else is left out.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import redis
import typer.main

from rollstream.commands.program import app
from rollstream.stack.ports_in_use import free_loopback_port
from tests.builders.configs import write_file
from tests.builders.datasets import write_voc
from tests.redis_servers import program_or_skip
from tests.source_tree import PACKAGES, ROOT

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
DOCUMENTS: Final = ("README.md", "docs/RUNBOOK.md")
PROGRAMS: Final = ("rollstream", "make", "docker", "redis-server", "torchrun", "rq")
BROKER: Final = "redis://broker-host:6379/0"
ROLES: Final = ("dispatch", "produce", "match", "pack", "archive", "learn")

NOT_RUN: Final = {
    "make check": "the CI runs it before the tests, and it runs the house rules, which are tests",
    "make up": "needs a Docker engine; test_compose_file.py checks all that the compose file names",
    "make down": "as above",
    "docker compose build": "as above",
    "docker compose exec learner rollstream top runs/compose": "as above",
    "docker compose up": "as above",
    "docker compose up --detach --no-recreate --scale producer=4 --scale matcher=2": "as above",
    "rollstream bench learning --config CONFIG": "three stacks a seed; test_bench_learning.py has its logic",
    "rollstream bench learning --config configs/demo.yaml --seeds 3 --b-ratio 0.2 --gate 0.5": "as above",
    "rollstream serve vllm CONFIG": "needs vLLM; tests/vllm/test_documented_commands.py runs it",
    "rollstream quarantine RUN RECORD_ID": "needs a step under way; test_quarantine.py is in one",
    "redis-server --aclfile users.acl …": "test_acl.py starts servers with such files",
}
# what makes a long command short, added to it
SHORTER: Final = {
    "make demo": "ARGS='--steps 20'",
    "make test": "ARGS='tests/unit/test_sweep_grid.py -k runs_are_named'",
    "rollstream bench queue": "--quick",
    "rollstream learn mine-warm.yaml": (
        "--set training.max_steps=2 --set training.warmup_steps=0 --set evaluation.num_samples=1"
    ),
    "rollstream up mine.yaml": (
        "--steps 2 --set model.name_or_path=runs/mine-warm/checkpoints/checkpoint-2"
        " --set evaluation.num_samples=1"
    ),
    "rollstream eval mine.yaml": "--set model.name_or_path=runs/mine-warm/checkpoints/checkpoint-2",
    "rollstream sweep CONFIG": "--grid grid.yaml --steps 2",
    "rollstream sweep configs/demo.yaml --steps 60 --set devices.learner_world_size=1": (
        "--grid grid.yaml --steps 2 --output runs/sweep-alone"
    ),
}
SMALL: Final = {
    "extends": "shipped_demo.yaml",
    "training": {
        "effective_batch_size": 8,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_every_steps": 2,
    },
    "evaluation": {"num_samples": 4},
    "custom": {"extra": {"rollout_matching": {"max_new_tokens": 48}}},
}


def documented_commands() -> list[str]:
    """Return every command of the documents once, in their order; words like `rollstream up` are mentions."""
    found: dict[str, None] = {}
    for name in DOCUMENTS:
        text = (ROOT / name).read_text("utf-8")
        blocks = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in lines:
            command = re.sub(r"\s+#.*$", "", line).strip()
            words = command.removeprefix(".venv/bin/").split()
            if len(words) > 1 and words[0] in PROGRAMS and not is_mention(words):
                found[re.sub(r"\s+", " ", command)] = None
    return list(found)


def is_mention(words: list[str]) -> bool:
    """Return whether words name a command of the program without the arguments that it cannot do without."""
    if words[0] != "rollstream":
        return False
    command, rest = typer.main.get_command(app), words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]  # type: ignore[attr-defined]
    needed = [item for item in command.params if item.required and item.param_type_name == "argument"]
    return len([word for word in rest if not word.startswith("-")]) < len(needed)


def is_role(command: str) -> bool:
    return BROKER in command and any(f" {role} " in command for role in ROLES)


def to_run_alone() -> list[str]:
    """Return the commands that run by themselves, each once however its placeholders are written."""
    chosen: dict[str, str] = {}
    for command in COMMANDS:
        if command not in NOT_RUN and not is_role(command):
            chosen.setdefault(with_demo(command.removeprefix(".venv/bin/")), command)
    return list(chosen.values())


def with_demo(command: str) -> str:
    """Return the command for the demo's configuration and run folder."""
    return command.replace(" CONFIG", " configs/demo.yaml").replace(" RUN", " runs/demo")


COMMANDS: Final = documented_commands()


@dataclass(frozen=True)
class Workspace:
    """A folder that looks like a checkout with small data, and a broker."""

    path: Path
    broker_url: str

    def filled(self, command: str) -> str:
        """Return the command with its placeholders replaced and, where it is long, what shortens it."""
        text = f"{with_demo(command)} {SHORTER.get(command.removeprefix('.venv/bin/'), '')}"
        for placeholder, value in (
            (BROKER, self.broker_url),
            (" URL", f" {self.broker_url}"),
            ("path/to/photographs", "voc"),
            ("gc runs/demo", "gc runs/ended"),
        ):
            text = text.replace(placeholder, value)
        return text.strip()

    def start(self, text: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a command line in a process group of its own."""
        environment = {
            **os.environ,
            "PATH": f"{self.path / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "120",
        }
        with log.open("ab") as output:
            return subprocess.Popen(
                ["bash", "-c", f"exec {text}"],
                cwd=self.path,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def run(self, text: str, *, timeout_s: float = 400) -> str:
        """Run a command line to its end and return what it said; fails with that on another status than 0."""
        log = self.path / "said.log"
        log.write_bytes(b"")
        process = self.start(text, log)
        try:
            status = process.wait(timeout=timeout_s)
        finally:
            end(process)
        said = log.read_text("utf-8", errors="replace")
        assert status == 0, f"{text}\nexit status {status}\n{said[-6000:]}"
        return said


def end(process: subprocess.Popen[bytes]) -> int:
    """Ask a command to end, kill it when it does not, and return its status."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait(timeout=10)


@pytest.fixture(scope="module")
def broker_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server as the runbook asks for; without one this skips on a laptop and fails in CI."""
    program = program_or_skip()
    folder, port = tmp_path_factory.mktemp("broker"), free_loopback_port()
    options = (
        "--bind",
        "127.0.0.1",
        "--appendonly",
        "yes",
        "--maxmemory-policy",
        "noeviction",
        "--maxmemory",
    )
    command = [program, "--port", str(port), *options, "2gb", "--dir", str(folder)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"redis://127.0.0.1:{port}/0"
    client = redis.Redis.from_url(url, retry=redis.retry.Retry(redis.backoff.ConstantBackoff(0.1), 200))
    client.ping()
    client.close()
    yield url
    process.terminate()
    process.wait(timeout=20)


@pytest.fixture(scope="module")
def workspace(
    tmp_path_factory: pytest.TempPathFactory, scenes: Path, tiny_model: Path, broker_url: str
) -> Workspace:
    """Set the workspace up and run the small demo in it once, as its user would."""
    path = tmp_path_factory.mktemp("checkout")
    for name in {*PACKAGES, "tests", "docs", "Makefile", "constraints.txt", "pyproject.toml"} - {"configs"}:
        (path / name).symlink_to(ROOT / name)
    subprocess.run(["cp", "-r", str(ROOT / "configs"), str(path)], check=True)
    (path / "configs" / "demo.yaml").rename(path / "configs" / "shipped_demo.yaml")
    write_file(path / "configs", dict(SMALL), "demo.yaml")
    write_file(path / "configs", {"extends": "demo.yaml", "run": {"name": "own"}}, "mine.yaml")
    write_file(path / "configs", {"extends": "demo.yaml", "run": {"name": "spread"}}, "spread.yaml")
    write_file(path, "blocks: [{product: {stage2_ab.schedule.b_ratio: [0]}}]\n", "grid.yaml")
    for folder, target in (("data/scenes", scenes), ("models/scenes_tiny", tiny_model)):
        (path / folder).parent.mkdir(exist_ok=True)
        (path / folder).symlink_to(target)
    boxes = {f"picture-{number}": [("cup", 5, 5, 30, 30)] for number in range(4)}
    names = sorted(boxes)
    write_voc(path / "voc", boxes, {"train": names[:3], "val": names[3:]})
    environment = path / ".venv"
    environment.mkdir()
    for item in ("bin", "lib", "pyvenv.cfg"):
        (environment / item).symlink_to(Path(sys.prefix) / item)
    (environment / ".installed").touch()
    made = Workspace(path, broker_url)
    made.run("rollstream up configs/demo.yaml")
    subprocess.run(["cp", "-r", str(path / "runs" / "demo"), str(path / "runs" / "ended")], check=True)
    return made


def test_commands_are_found_and_every_exception_is_still_documented() -> None:
    assert len(COMMANDS) >= 30
    assert set(NOT_RUN) <= set(COMMANDS), set(NOT_RUN) - set(COMMANDS)
    known = {command.removeprefix(".venv/bin/") for command in COMMANDS}
    assert set(SHORTER) <= known, set(SHORTER) - known
    assert sum(is_role(command) for command in COMMANDS) >= len(ROLES)


@pytest.mark.req("O-8")
@pytest.mark.parametrize("command", to_run_alone())
def test_a_documented_command_runs(workspace: Workspace, command: str) -> None:
    workspace.run(workspace.filled(command))


@pytest.mark.req("O-8")
def test_the_roles_of_the_runbook_train_together_and_torchrun_goes_on_over_two_nodes(
    workspace: Workspace,
) -> None:
    """The learner ends after its steps; then two torchrun agents take its place for some more."""
    # a run folder belongs to one broker, and `up` has used the one of mine.yaml
    roles = [command.replace("mine.yaml", "spread.yaml") for command in COMMANDS if is_role(command)]
    learners = [command for command in roles if " learn " in command]
    (alone,) = (command for command in learners if "torchrun" not in command)
    nodes = [command for command in learners if "torchrun" in command]
    others = [command for command in roles if command not in learners]
    assert len(nodes) == 2
    logs = workspace.path / "role-logs"
    logs.mkdir()
    running = [
        workspace.start(workspace.filled(command), logs / f"{number}.log")
        for number, command in enumerate(others)
    ]
    try:
        workspace.run(workspace.filled(alone))
        assert [process.poll() for process in running] == [None] * len(running)
        port = free_loopback_port()
        agents = [
            workspace.start(
                workspace.filled(node)
                .replace("--nproc-per-node 4", "--nproc-per-node 1")
                .replace("node0", "127.0.0.1")
                .replace("29500", str(port))
                + " --set training.max_steps=6",
                logs / f"node-{number}.log",
            )
            for number, node in enumerate(nodes)
        ]
        running += agents
        assert [agent.wait(timeout=300) for agent in agents] == [0, 0], said_in(logs)
    finally:
        statuses = [end(process) for process in running]
    assert set(statuses) <= {0, 128 + signal.SIGTERM, -signal.SIGTERM}, said_in(logs)
    log = (workspace.path / "runs" / "spread" / "train_log.jsonl").read_text("utf-8")
    assert [f'"optimizer_step": {step},' in log for step in range(6)] == [True] * 6


def said_in(logs: Path) -> str:
    return "\n".join(
        f"== {path.name}\n{path.read_text('utf-8')[-1500:]}" for path in sorted(logs.glob("*.log"))
    )
