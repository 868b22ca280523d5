"""The doctor's look at the broker: what it says of itself, and whether a run can rely on it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import redis

from broker_schemas.broker.connection import LOWEST_SERVER, broker_errors, check_server, open_redis
from broker_schemas.errors import BrokerError, ConfigError
from configs import RunConfig
from rollstream.doctor.findings import Finding, fail, ok, warn
from rollstream.stack.embedded_redis import find_redis_server
from rollstream.wiring import access

SKEW_WARN_MS: Final = 2_000
SKEW_FAIL_MS: Final = 30_000
# payloads are not all of it: streams, the log and the server's own structures
MEMORY_FACTOR: Final = 1.5


@dataclass(frozen=True, kw_only=True)
class BrokerFacts:
    """What a server says. ``skew_ms``: its clock minus ours; ``appendfsync`` may be kept from us: empty."""

    server: str
    is_append_only: bool
    appendfsync: str
    eviction: str
    memory_limit_bytes: int
    used_memory_bytes: int
    skew_ms: int
    is_cluster: bool = False


def examine_broker(config: RunConfig) -> list[Finding]:
    """Return the findings on the run's broker, embedded or not."""
    if config.broker.url is None:
        try:
            return [ok("broker", f"embedded, {find_redis_server()}")]
        except ConfigError as exc:
            return [fail("broker", "no redis-server here", str(exc))]
    try:
        facts = read_facts(config)
    except ConfigError as exc:
        return [fail("broker", str(exc), "set that variable, or correct its name in the configuration")]
    except BrokerError as exc:
        remedy = "start that server, correct broker.url, or leave it out for an embedded one"
        return [fail("broker", str(exc), remedy)]
    lowest = ".".join(str(part) for part in LOWEST_SERVER[:2])
    return [
        ok("broker", f"version {facts.server}, {lowest} or newer is needed"),
        judge_persistence(facts, config.broker.durability),
        judge_eviction(facts),
        judge_memory(facts, config.broker.max_bytes),
        judge_clock(facts),
        judge_jobs(facts, has_own_server=config.broker.jobs_url is not None),
    ]


def read_facts(config: RunConfig) -> BrokerFacts:
    """Ask the server of ``broker.url``; raises ConfigError, BrokerError."""
    address = dataclasses.replace(access.broker_address(config), retries=0)
    client = open_redis(address, socket_timeout_s=5.0)
    try:
        server = check_server(client, address)
        with broker_errors("asking the broker about itself"):
            before_ms = time.time() * 1000
            seconds, microseconds = client.time()
            now_ms = (before_ms + time.time() * 1000) / 2
            memory: Mapping[str, Any] = client.info("memory")
            cluster: Mapping[str, Any] = client.info("cluster")
            persistence: Mapping[str, Any] = client.info("persistence")
        return BrokerFacts(
            server=server,
            is_append_only=bool(persistence.get("aof_enabled")),
            appendfsync=_appendfsync(client),
            eviction=str(memory.get("maxmemory_policy", "")),
            memory_limit_bytes=int(memory.get("maxmemory", 0)),
            used_memory_bytes=int(memory["used_memory"]),
            skew_ms=round(int(seconds) * 1000 + int(microseconds) / 1000 - now_ms),
            is_cluster=bool(int(cluster.get("cluster_enabled") or 0)),
        )
    finally:
        client.close()


def _appendfsync(client: redis.Redis) -> str:
    """Return the server's setting; managed servers refuse the question."""
    try:
        return str(client.config_get("appendfsync").get("appendfsync", ""))
    except redis.exceptions.ResponseError:
        return ""


def judge_persistence(facts: BrokerFacts, durability: str) -> Finding:
    """Compare what the server keeps on disk with ``broker.durability``."""
    check = "broker persistence"
    if durability == "none":
        return ok(check, "broker.durability is none: a restart of the broker loses the queue")
    if not facts.is_append_only:
        remedy = "config set appendonly yes on the server, or say broker.durability: none if you mean it"
        return fail(check, f"append-only file off, broker.durability is {durability}", remedy)
    if durability == "always" and facts.appendfsync and facts.appendfsync != "always":
        remedy = "config set appendfsync always on the server, or say broker.durability: everysec"
        return fail(check, f"appendfsync {facts.appendfsync}, broker.durability is always", remedy)
    return ok(check, f"append-only file on, appendfsync {facts.appendfsync or 'not told'}")


def judge_eviction(facts: BrokerFacts) -> Finding:
    """A server that evicts loses records without a word."""
    if facts.eviction in ("", "noeviction"):
        return ok("broker eviction", facts.eviction or "policy not told")
    remedy = "config set maxmemory-policy noeviction: a server that evicts loses records uncounted"
    return fail("broker eviction", f"maxmemory-policy {facts.eviction}", remedy)


def judge_memory(facts: BrokerFacts, budget_bytes: int) -> Finding:
    """Compare the server's memory with the run's budget."""
    check, limit = "broker memory", facts.memory_limit_bytes
    used = f"{_mib(facts.used_memory_bytes)} used"
    if limit == 0:
        remedy = f"set maxmemory, {_mib(budget_bytes * MEMORY_FACTOR)} at least for this run"
        return warn(check, f"{used}, no maxmemory: a full machine kills the server", remedy)
    if limit < budget_bytes:
        remedy = "raise maxmemory, or lower broker.max_bytes below it"
        return fail(check, f"maxmemory {_mib(limit)} is below broker.max_bytes {_mib(budget_bytes)}", remedy)
    if limit - facts.used_memory_bytes < budget_bytes * MEMORY_FACTOR:
        remedy = "raise maxmemory, lower broker.max_bytes, or free other runs (their namespaces stay there)"
        return warn(check, f"{used} of {_mib(limit)}, the run may want {_mib(budget_bytes)}", remedy)
    return ok(check, f"{used} of {_mib(limit)}, the run may want {_mib(budget_bytes)}")


def judge_jobs(facts: BrokerFacts, *, has_own_server: bool) -> Finding:
    """RQ's keys lie in many slots of a cluster, and one call of it touches several."""
    if facts.is_cluster and not has_own_server:
        remedy = "give RQ's jobs a server of their own: broker.jobs_url"
        return fail("broker jobs", "a cluster cannot hold RQ's jobs (CROSSSLOT)", remedy)
    return ok("broker jobs", "on broker.jobs_url" if has_own_server else "on the same server")


def judge_clock(facts: BrokerFacts) -> Finding:
    """Ages are told by the server's clock, generation times by ours."""
    found = f"{facts.skew_ms / 1000:+.1f} s against this machine"
    remedy = "set the clocks of both machines by NTP: ages of rollouts would be wrong"
    if abs(facts.skew_ms) >= SKEW_FAIL_MS:
        return fail("broker clock", found, remedy)
    return (
        warn("broker clock", found, remedy)
        if abs(facts.skew_ms) >= SKEW_WARN_MS
        else ok("broker clock", found)
    )


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / (1 << 20):.0f} MiB"
