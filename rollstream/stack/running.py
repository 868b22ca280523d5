"""The whole stack as processes of this machine, behind ``rollstream up`` [O-2].

Owns what happens before the first process starts and after the last one ended; `supervisor` has the rest.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress, open_redis
from broker_schemas.broker.keys import RunKeys
from broker_schemas.records.identity import RunIdentity
from configs import RunConfig, load_config
from rollstream.run_lock import StackLock
from rollstream.stack.last_evaluation import LastEvaluation
from rollstream.stack.monitor import Monitor
from rollstream.stack.plan import (
    BROKER,
    LEARNER,
    LaunchSettings,
    RoleCommand,
    RoleName,
    planned_roles,
    role_command,
    role_environment,
)
from rollstream.stack.preflight import check_inputs
from rollstream.stack.restart_policy import RestartSettings
from rollstream.stack.role_process import BrokerProcess, RoleProcess
from rollstream.stack.scrape_targets import remove_targets, write_targets
from rollstream.stack.stop_signals import StopSignals
from rollstream.stack.supervisor import Member, StackResult, Supervisor
from rollstream.stack.view import StackView
from rollstream.staged_folder import write_atomically
from rollstream.watch.broker_watch import BrokerWatch
from rollstream.wiring import access
from rollstream.wiring.identity import adopt_on_broker, settle_identity
from rollstream.wiring.trainable import describe_untrainable, write_untrainable

__all__ = ["StackOptions", "StackResult", "run_stack"]
SIGNAL_BASE: Final = 128
MOVED_STATUS: Final = 3


@dataclass(frozen=True, kw_only=True)
class StackOptions:
    """What the command line says beyond the file; None leaves the configuration's number.

    ``overrides`` are those the configuration was loaded with. ``live``: the table, where it is a terminal.
    """

    steps: int | None = None
    producers: int | None = None
    matchers: int | None = None
    overrides: tuple[str, ...] = ()
    live: bool = True
    console: Console | None = None

    def all_overrides(self) -> tuple[str, ...]:
        """Return the overrides with the numbers among them, for every process alike."""
        numbers = {
            "training.max_steps": self.steps,
            "producers.num_workers": self.producers,
            "matchers.num_workers": self.matchers,
        }
        return (*self.overrides, *(f"{key}={value}" for key, value in numbers.items() if value is not None))


def run_stack(
    config_path: Path,
    config: RunConfig,
    options: StackOptions,
    role_command: RoleCommand = role_command,
    restarts: RestartSettings = RestartSettings(),
) -> StackResult:
    """Run the stack until the learner is done or a signal comes; no process is left then.

    Call it from the main thread. The exit status is 0 when the learner finished, 2 or 3 when a role gave up
    for good, 128 + n after signal n. Raises ConfigError, DataError, BrokerError before anything is started.
    """
    overrides = options.all_overrides()
    config = load_config(config_path, overrides) if overrides != options.overrides else config
    folder = access.run_folder(config)
    StackLock.check_free(folder.path)
    untrainable = check_inputs(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = StackLock.acquire(folder.path)
    try:
        identity = settle_identity(config)
        write_untrainable(config, untrainable)
        for line in describe_untrainable(untrainable):
            (options.console or Console()).print(line, markup=False, soft_wrap=True)
        launch = LaunchSettings(
            config_path=config_path, overrides=overrides, learner_world_size=config.learner_world_size
        )
        write_targets(config)
        return _LocalStack(config, identity, lock, launch, role_command, options, restarts).run()
    finally:
        remove_targets(config)
        lock.release()


class _LocalStack:
    """The processes of one run with what watches them."""

    def __init__(
        self,
        config: RunConfig,
        identity: RunIdentity,
        lock: StackLock,
        launch: LaunchSettings,
        role_command: RoleCommand,
        options: StackOptions,
        restarts: RestartSettings,
    ) -> None:
        self._restarts = restarts
        self._config = config
        self._identity = identity
        self._folder = access.run_folder(config)
        self._lock = lock
        self._launch = launch
        self._role_command = role_command
        self._options = options
        self._console = options.console or Console()

    def run(self) -> StackResult:
        with StopSignals() as signals:
            try:
                broker = self._start_broker() if self._config.broker.url is None else None
            except KeyboardInterrupt:
                return _interrupted(signals)
            try:
                return self._run_members(broker, signals)
            finally:
                if broker is not None:
                    broker.kill()
                    self._folder.broker.unlink(missing_ok=True)

    def _start_broker(self) -> BrokerProcess:
        broker = BrokerProcess(self._folder.redis_dir, durability=self._config.broker.durability)
        broker.start()
        return broker

    def _run_members(self, broker: BrokerProcess | None, signals: StopSignals) -> StackResult:
        address = self._address(broker)
        self._write_broker_file(address, broker)
        self._adopt(address)
        members = self._members(address, broker)
        monitor = self._monitor(address, members, is_own_server=broker is not None)
        view = StackView(
            self._folder,
            self._console,
            max_steps=self._config.training.max_steps,
            is_live=self._options.live and self._console.is_terminal,
            last_sample=lambda: monitor.last_sample,
        )
        supervisor = Supervisor(
            members,
            settings=self._restarts,
            clock=time.monotonic,
            pause=signals.pause,
            tick=view.tick,
            say=view.say,
        )
        try:
            with view:
                monitor.start()
                result = supervisor.run(lambda: _stop_reason(signals) or self._moved_folder())
                if not result.exit_status:  # it may have gone in the very last moment
                    result = self._moved_folder() or result
                if not result.exit_status and self._config.evaluates_in_stack:
                    self._stay_for_evaluation(address, supervisor, signals, view)
                if result.exit_status:
                    view.say("stopping the stack; Ctrl-C kills what is left of it")
                supervisor.stop_roles()
                monitor.stop()
                supervisor.stop_broker()
            return result
        except KeyboardInterrupt:
            return _interrupted(signals)
        finally:
            monitor.end()
            supervisor.kill()

    def _stay_for_evaluation(
        self, address: BrokerAddress, supervisor: Supervisor, signals: StopSignals, view: StackView
    ) -> None:
        """Let the producers answer for the last policies; the learner is gone, nothing waits but this."""
        last = LastEvaluation.of(self._config, address)
        if last.is_settled():
            return
        view.say("the learner is done; waiting for the last evaluation, Ctrl-C ends it")
        give_up_at_s = time.monotonic() + self._config.stage2_async.stall_timeout_s
        try:
            supervisor.stay(
                lambda: last.is_settled() or time.monotonic() > give_up_at_s, lambda: _stop_reason(signals)
            )
            if not last.is_settled():
                view.say(
                    "the last evaluation is not complete; rollstream eval makes one of the last checkpoint"
                )
        finally:
            last.close()

    def _moved_folder(self) -> StackResult | None:
        if self._lock.is_in_place(self._folder.path):
            return None
        return StackResult(
            exit_status=MOVED_STATUS,
            reason=f"{self._folder.path}: the run folder was moved, replaced or removed while the stack ran; "
            "put it back where it was, then the same command goes on with the run",
        )

    def _address(self, broker: BrokerProcess | None) -> BrokerAddress:
        return BrokerAddress(url=broker.url) if broker is not None else access.broker_address(self._config)

    def _write_broker_file(self, address: BrokerAddress, broker: BrokerProcess | None) -> None:
        content = {"url": address.shown, "pid": broker.pid if broker is not None else None}
        write_atomically(self._folder.broker, json.dumps(content) + "\n")

    def _adopt(self, address: BrokerAddress) -> None:
        """Tell the broker whose run it holds; raises ConfigError where it holds another of this name."""
        broker = Broker.connect(self._config.run.name, address)
        try:
            adopt_on_broker(self._config, broker, self._identity)
        finally:
            broker.close()

    def _members(self, address: BrokerAddress, broker: BrokerProcess | None) -> list[Member]:
        launch = self._launch
        members = []
        if broker is not None:
            launch = dataclasses.replace(launch, overrides=(*launch.overrides, f"broker.url={address.url}"))
            running = Member(name=RoleName(role=BROKER), process=broker, state="running")
            running.started_at_s = time.monotonic()
            members.append(running)
        return [*members, *(self._role_member(name, launch) for name in planned_roles(self._config))]

    def _role_member(self, name: RoleName, launch: LaunchSettings) -> Member:
        process = RoleProcess(
            lambda: self._role_command(name, launch),
            self._folder.role_log(name.role, name.index),
            role_environment(self._config.training.num_threads),
            has_ranks=name.role == LEARNER,
        )
        return Member(name=name, process=process)

    def _monitor(self, address: BrokerAddress, members: list[Member], *, is_own_server: bool) -> Monitor:
        quick = dataclasses.replace(address, retries=0)
        broker = Broker(open_redis(quick, socket_timeout_s=2.0), RunKeys(self._config.run.name), quick)
        watch = BrokerWatch(broker, self._config.learner_world_size, is_own_server=is_own_server)
        return Monitor(watch, self._folder.stack_samples, lambda: [member.row() for member in members])


def _stop_reason(signals: StopSignals) -> StackResult | None:
    if signals.first is None:
        return None
    return StackResult(
        exit_status=SIGNAL_BASE + signals.first,
        reason=f"stopped by {signals.first.name}; the same command goes on with the run",
    )


def _interrupted(signals: StopSignals) -> StackResult:
    """Return the result after a second signal: everything was killed."""
    number = signals.first or SIGNAL_BASE
    return StackResult(
        exit_status=SIGNAL_BASE + number,
        reason="killed by a second signal; the same command goes on from the last checkpoint",
    )
