"""`rollstream serve vllm`: starts the vLLM servers of a run, shows their log, waits for their health."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Final

import rollstream
from broker_schemas.errors import ConfigError, RunStopped
from broker_schemas.rollout_servers.vllm_http import VllmServer
from configs import RunConfig
from rollstream.vllm.plan import ServeOptions, ServerPlan, plan_servers
from rollstream.wiring import access

LOG = logging.getLogger("rollstream.serve")
PYTHON_VARIABLE: Final = "ROLLSTREAM_VLLM_PYTHON"
OWN_ENVIRONMENT: Final = Path(".venv-vllm/bin/python")
LAST_LINES: Final = 30
STOP_TIMEOUT_S: Final = 20.0
LOOK_EVERY_S: Final = 0.5


def vllm_python(environment: Mapping[str, str]) -> Path | None:
    """Return the interpreter that has vLLM; None where there is none.

    The environment variable ROLLSTREAM_VLLM_PYTHON, else ``.venv-vllm`` of the working directory or the
    project, else this interpreter.
    """
    if named := environment.get(PYTHON_VARIABLE):
        return Path(named)
    for folder in (Path.cwd(), Path(rollstream.__file__).resolve().parent.parent):
        if (folder / OWN_ENVIRONMENT).is_file():
            return folder / OWN_ENVIRONMENT
    return Path(sys.executable) if importlib.util.find_spec("vllm") is not None else None


class VllmProcess:
    """One running server; a context manager that stops it with all its children."""

    def __init__(self, plan: ServerPlan, python: Path) -> None:
        self.plan = plan
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._process = subprocess.Popen(
            [str(python), "-m", "vllm.entrypoints.cli.main", "serve", *plan.flags],
            env={**os.environ, **plan.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # a group of its own: the engine and its workers are children that must end with it
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._show_log, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def __enter__(self) -> VllmProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def wait_until_healthy(self, timeout_s: float) -> None:
        """Return when it answers; raises RunStopped with the end of its log when it ends or takes longer."""
        give_up_at = time.monotonic() + timeout_s
        door = VllmServer(self.plan.base_url, timeout_s=timeout_s)
        try:
            while not door.is_healthy():
                if self.exit_status is not None:
                    raise RunStopped(f"{self._name} ended with status {self.exit_status}:\n{self._tail}")
                if time.monotonic() > give_up_at:
                    raise RunStopped(
                        f"{self._name} was not healthy after {timeout_s:g} s "
                        f"(vllm.server.timeout_s):\n{self._tail}"
                    )
                time.sleep(LOOK_EVERY_S)
        finally:
            door.close()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join()

    def stop(self) -> None:
        """Ask it to end, then make it; safe to call twice."""
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            LOG.warning("%s did not stop in %g s", self._name, STOP_TIMEOUT_S)
        self.kill()

    @property
    def _name(self) -> str:
        return f"rollout server {self.plan.index} at {self.plan.base_url}"

    @property
    def _tail(self) -> str:
        return "\n".join(self._last)

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    def _show_log(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._last.append(line.rstrip())
                sys.stderr.write(f"[vllm-{self.plan.index}] {line}")
                sys.stderr.flush()


def serve(config: RunConfig, options: ServeOptions) -> int:
    """Run the servers until a signal, or until one ends by itself; return the exit status.

    Raises ConfigError where vLLM is missing or the plan cannot be, RunStopped when one does not start.
    """
    python = vllm_python(os.environ)
    if python is None:
        raise ConfigError(
            "vllm: not installed; run scripts/install_vllm.sh (CPU), or install the extra 'vllm' on a GPU "
            f"machine and name its interpreter in {PYTHON_VARIABLE}"
        )
    plans = plan_servers(config, access.model_dir(config), options)
    stop = access.stop_on_signals()
    processes: list[VllmProcess] = []
    try:
        for plan in plans:
            LOG.info("starting server %d at %s, GPUs %s", plan.index, plan.base_url, plan.gpus or "none")
            processes.append(VllmProcess(plan, python))
        for process in processes:
            _wait_or_stop(process, config.rollout_matching.vllm.server.timeout_s, stop)
        if not stop.is_set():
            LOG.info("all %d servers are healthy", len(processes))
        return _watch(processes, stop)
    finally:
        for process in processes:
            process.stop()


def _wait_or_stop(process: VllmProcess, timeout_s: float, stop: threading.Event) -> None:
    if stop.is_set():
        return
    try:
        process.wait_until_healthy(timeout_s)
    except RunStopped:
        if not stop.is_set():
            raise


def _watch(processes: list[VllmProcess], stop: threading.Event) -> int:
    while not stop.wait(LOOK_EVERY_S):
        for process in processes:
            if process.exit_status is not None:
                LOG.error("server %d ended with status %d", process.plan.index, process.exit_status)
                return 1
    return 0
