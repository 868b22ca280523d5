"""A role that does what one word says. Roles meet through lists in the run's own Redis, so nobody sleeps.

Run as ``python -m tests.e2e.fake_role URL FOLDER NAME BEHAVIOUR WORD...``; imports little, to start quickly.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from rollstream.stack.bound_process import bound_command


class FakeRole:
    """One fake role: a name, the run's Redis, and a diary."""

    def __init__(self, url: str, root: Path, name: str) -> None:
        self.url = url
        self.broker = redis.Redis.from_url(url)
        self.root = root
        self.name = name
        self.write(f"began {os.getpid()}")

    def write(self, text: str) -> None:
        with (self.root / "diary").open("a", encoding="utf-8") as diary:
            diary.write(f"{self.name} {text}\n")

    def say(self, text: str) -> None:
        sys.stderr.write(text + "\n")

    def serve(self) -> int:
        """Serve until SIGTERM."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        self.broker.rpush("up", self.name)
        signal.sigwait({signal.SIGTERM})
        self.write("stopped")
        return 0

    def stubborn(self) -> int:
        """Tell the test when SIGTERM comes, and go on."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
        self.broker.rpush("up", self.name)
        signal.sigwait({signal.SIGTERM})
        self._announce("asked to end")
        return int(signal.sigwait({signal.SIGUSR1}))

    def _announce(self, text: str) -> None:
        (self.root / "announced").write_text(text)

    def finish_after(self, num_up: str) -> int:
        """Be a learner that is done once so many others were up."""
        self._wait_for_others(num_up)
        return 0

    def _wait_for_others(self, num_up: str) -> None:
        for _ in range(int(num_up)):
            assert self.broker.blpop(["up"], timeout=60) is not None

    def announce(self, num_up: str, rank_behaviour: str) -> int:
        """Be a torchrun: one rank in a session of its own, and tell the test when all are up."""
        own = [sys.executable, "-m", "tests.e2e.fake_role", self.url, str(self.root), "rank 0"]
        bound = bound_command([*own, rank_behaviour], parent_pid=None)
        rank = subprocess.Popen(bound, start_new_session=True)
        self._wait_for_others(num_up)
        self._announce("up")
        return rank.wait()

    def die(self, num_deaths: str) -> int:
        """Die so many times, then serve."""
        if self.broker.incr(f"starts:{self.name}") <= int(num_deaths):
            self.say(f"boom of {self.name}")
            return 7
        return self.serve()

    def die_then_finish(self, num_up: str) -> int:
        """Be a learner that dies once."""
        if self.broker.incr(f"starts:{self.name}") == 1:
            return 7
        return self.finish_after(num_up)

    def refuse(self, exit_status: str) -> int:
        """End with a message of ours."""
        self.say("rollstream: train.jsonl:3: no field 'objects'\n  write it")
        return int(exit_status)

    def remember(self, num_up: str) -> int:
        """Be a learner that counts its runs in the broker."""
        self._wait_for_others(num_up)
        self.write(f"run number {self.broker.incr('runs')}")
        return 0

    def kill_broker(self, num_up: str) -> int:
        """Be a learner that kills the broker and waits for it to come back with what it held."""
        self._wait_for_others(num_up)
        self.broker.set("kept", "yes")
        pid = int(self.broker.info("server")["process_id"])
        killed = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        select.select([killed], [], [], 30)
        patient = Retry(ConstantBackoff(0.1), 200)
        again = redis.Redis.from_url(self.url, retry=patient, retry_on_error=[redis.ConnectionError])
        self.write(f"kept {again.get('kept')!r}")
        return 0


def main() -> int:
    url, root, name, behaviour, *words = sys.argv[1:]
    return int(getattr(FakeRole(url, Path(root), name), behaviour)(*words))


if __name__ == "__main__":
    sys.exit(main())
