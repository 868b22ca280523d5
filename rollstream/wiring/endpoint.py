"""What a process says of itself over HTTP: `/metrics`, `/healthz` (it lives) and `/readyz` (it can work).

`/targets` is where Prometheus finds the ranks of a learner, however many (`http_sd_configs`).

Every sample carries the labels ``run`` and ``role``, so that any scrape configuration tells runs apart.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from broker_schemas.broker.connection import broker_errors, open_redis
from broker_schemas.broker.keys import RunKeys
from broker_schemas.errors import ConfigError, RollstreamError

if TYPE_CHECKING:
    import redis

    from configs import RunConfig

PROBE_TIMEOUT_S: Final = 2.0
PROBE_KEPT_S: Final = 1.0
# what each role reads before it can work: it calls `reached` with it. Broker and policy are probed instead
NEEDS: Final[Mapping[str, tuple[str, ...]]] = dict.fromkeys(("learn", "match", "produce"), ("model",))
ROLE_OF_COMMAND: Final[Mapping[str, str]] = {
    "learn": "learner",
    "dispatch": "dispatcher",
    "pack": "packer",
    "gather": "evaluator",
    "archive": "archive",
    "export": "exporter",
    "match": "matcher",
    "produce": "producer",
}
Probe = Callable[[], Mapping[str, str]]


class Readiness:
    """What a process still lacks before it can work; safe to tell and to ask from any thread.

    ``probe`` looks at what may go away again: it returns name -> "" or what is wrong.
    """

    def __init__(self, needs: Sequence[str], probe: Probe = dict) -> None:
        self._missing = dict.fromkeys(needs, "not there yet")
        self._probe = probe
        self._lock = threading.Lock()
        self._probed: Mapping[str, str] = {}
        self._probed_at_s = -PROBE_KEPT_S

    def reached(self, name: str) -> None:
        """Note that something the process needed is there; it stays."""
        self._missing.pop(name, None)

    def lacks(self) -> dict[str, str]:
        """Return what is missing, by name with its reason; the probe's answer is kept for a second."""
        with self._lock:  # many askers make one look
            if time.monotonic() - self._probed_at_s >= PROBE_KEPT_S:
                self._probed = self._probe()
                self._probed_at_s = time.monotonic()
            found = {name: why for name, why in self._probed.items() if why}
        return {**dict(self._missing), **found}


class LabelledView(Collector):
    """A registry seen with labels of the process on every sample."""

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        self._registry = registry
        self._labels = dict(labels)

    def collect(self) -> Iterator[Metric]:
        """Yield every family with its samples labelled."""
        for family in self._registry.collect():
            family.samples = [
                sample._replace(labels={**self._labels, **sample.labels}) for sample in family.samples
            ]
            yield family


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that gave up waiting: a probe does so wherever the machine is busy."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Endpoint:
    """The registry of a process and, unless ``metrics.base_port`` is 0, its server until the process ends."""

    def __init__(self, registry: CollectorRegistry, readiness: Readiness) -> None:
        self.registry = registry
        self._readiness = readiness

    def reached(self, name: str) -> None:
        """Note that something this process needs (model, policy) is there."""
        self._readiness.reached(name)

    @classmethod
    def start(cls, config: RunConfig, command: str, index: int, port: int) -> Endpoint:
        """Serve at ``port``, 0 for nowhere; raises ConfigError for a port that cannot be used."""
        registry = CollectorRegistry()
        readiness = Readiness(NEEDS.get(command, ()), broker_probe(config, command))
        if port:
            ProcessCollector(registry=registry)
            build = Gauge("rollstream_build_info", "1, with the version.", ["version"], registry=registry)
            build.labels(own_version()).set(1)
            labels = {"run": config.run.name, "role": ROLE_OF_COMMAND[command]}
            beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if command == "learn" else 1
            view, name = LabelledView(registry, labels), f"{command} {index}"
            serve(config.metrics.host, port, view, readiness, name, beside)
        return cls(registry, readiness)


def own_version() -> str:
    """Return the installed version, "source" for one that is not installed."""
    try:
        return version("rollstream")
    except PackageNotFoundError:
        return "source"


def broker_probe(config: RunConfig, command: str) -> Probe:
    """Return a look at the run's broker, and for a producer whether a policy is published there."""
    if config.broker.url is None:
        return dict
    clients: list[redis.Redis] = []

    def look() -> Mapping[str, str]:
        try:
            if not clients:
                clients.append(_quick_client(config))
            with broker_errors("asking the broker"):
                if command != "produce":
                    clients[0].ping()
                    return {"broker": ""}
                is_published = clients[0].hgetall(RunKeys(config.run.name).named("policy"))
                return {"broker": "", "policy": "" if is_published else "no policy is published yet"}
        except RollstreamError as exc:
            return {"broker": str(exc)}

    return look


def _quick_client(config: RunConfig) -> redis.Redis:
    from rollstream.wiring.access import broker_address

    return open_redis(replace(broker_address(config), retries=0), socket_timeout_s=PROBE_TIMEOUT_S)


def serve(
    host: str, port: int, view: LabelledView, readiness: Readiness, name: str, num_beside: int = 1
) -> ThreadingHTTPServer:
    """Answer requests from a thread of its own; raises ConfigError for a port that cannot be used.

    ``num_beside``: processes of this role on this host, at ports from this one on.
    """
    ports = [port + number for number in range(num_beside)]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path in ("/", "/metrics"):
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._answer(200, encode(view), content_type)
            elif path == "/targets":
                found = [{"targets": self._targets(), "labels": {}}]
                self._answer(200, json.dumps(found).encode(), "application/json")
            elif path == "/healthz":
                self._answer(200, b"alive\n")
            elif path == "/readyz":
                lacks = readiness.lacks()
                body = json.dumps({"ready": not lacks, "lacks": lacks}) + "\n"
                self._answer(503 if lacks else 200, body.encode(), "application/json")
            else:
                self._answer(404, b"expected /metrics, /healthz, /readyz or /targets\n")

        def _targets(self) -> list[str]:
            """Return the endpoints beside this one, under the name by which it was asked for."""
            name = self.headers.get("Host", host).partition(":")[0]
            return [f"{name}:{other}" for other in ports]

        def _answer(self, status: int, body: bytes, content_type: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: a probe comes every few seconds."""

    server = _bound(host, port, Handler, name)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server


def _bound(host: str, port: int, handler: type[BaseHTTPRequestHandler], name: str) -> ThreadingHTTPServer:
    try:
        return _Server((host, port), handler)
    except OSError as exc:
        raise ConfigError(
            f"metrics of {name}: port {port} on {host} cannot be used ({exc.strerror}); "
            "set metrics.base_port to another port, or to 0 for no endpoints"
        ) from exc
