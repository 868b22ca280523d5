"""What a process tells over HTTP: its metrics with run and role, that it lives, and whether it can work."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Mapping
from http.client import HTTPConnection
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from broker_schemas.errors import ConfigError
from rollstream.wiring.endpoint import Endpoint, LabelledView, Readiness, serve
from tests.builders.configs import load_mapping, make_mapping


def get(port: int, path: str) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.mark.req("O-3")
def test_samples_carry_run_and_role_and_the_process_tells_of_itself(tmp_path: Path) -> None:
    # given a producer of a run, at a port of its own
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    config = load_mapping(tmp_path, make_mapping(metrics__base_port=9400))
    endpoint = Endpoint.start(config, "produce", 0, port)
    Counter("rollstream_test_things_total", "Things.", ["kind"], registry=endpoint.registry).labels("a").inc()
    # when
    status, text = get(port, "/metrics")
    # then
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {"process_cpu_seconds", "process_resident_memory_bytes", "rollstream_build_info"} <= set(families)
    for family in families.values():
        for sample in family.samples:
            assert sample.labels["run"] == "test"
            assert sample.labels["role"] == "producer"
    (things,) = [item for item in families["rollstream_test_things"].samples if item.name.endswith("_total")]
    assert (things.labels["kind"], things.value) == ("a", 1.0)


def served(readiness: Readiness) -> int:
    view = LabelledView(CollectorRegistry(), {"run": "r", "role": "matcher"})
    server = serve("127.0.0.1", 0, view, readiness, "match 0")
    return int(server.server_address[1])


@pytest.mark.req("O-1")
def test_a_process_lives_at_once_and_is_ready_when_nothing_is_missing() -> None:
    broker = {"broker": "no connection"}
    readiness = Readiness(("model",), lambda: dict(broker))
    port = served(readiness)

    assert get(port, "/healthz") == (200, "alive\n")
    status, body = get(port, "/readyz")
    assert status == 503
    assert json.loads(body) == {
        "ready": False, "lacks": {"model": "not there yet", "broker": "no connection"},
    }  # fmt: skip
    readiness.reached("model")
    broker["broker"] = ""
    end_s = time.monotonic() + 10
    while get(port, "/readyz")[0] == 503 and time.monotonic() < end_s:
        time.sleep(0.05)
    assert get(port, "/readyz")[0] == 200
    broker["broker"] = "gone again"
    while get(port, "/readyz")[0] == 200 and time.monotonic() < end_s:
        time.sleep(0.05)
    assert json.loads(get(port, "/readyz")[1])["lacks"] == {"broker": "gone again"}
    assert get(port, "/other")[0] == 404


@pytest.mark.req("O-1")
@pytest.mark.parametrize("command", ["produce", "match", "learn", "dispatch", "pack", "gather", "archive"])
def test_a_role_is_ready_when_it_has_read_its_model(tmp_path: Path, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    config = load_mapping(tmp_path, make_mapping(metrics__base_port=9400))
    endpoint = Endpoint.start(config, command, 0, port)

    endpoint.reached("model")

    assert get(port, "/readyz") == (200, '{"ready": true, "lacks": {}}\n')


def test_a_client_that_gives_up_leaves_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    asked, gone = threading.Event(), threading.Event()

    def probe() -> Mapping[str, str]:
        asked.set()
        gone.wait(10)
        return {}

    port = served(Readiness((), probe))
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
        assert asked.wait(10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    gone.set()

    assert get(port, "/healthz")[0] == 200
    time.sleep(0.1)
    assert capfd.readouterr().err == ""


def test_the_first_rank_names_all_ranks_by_the_name_it_was_asked_by() -> None:
    view = LabelledView(CollectorRegistry(), {})
    server = serve("127.0.0.1", 0, view, Readiness(()), "learn 0", num_beside=3)
    port = int(server.server_address[1])
    # the ports count from the one that was asked for, which was 0 here
    status, body = get(port, "/targets")
    assert (status, json.loads(body)) == (
        200, [{"targets": ["127.0.0.1:0", "127.0.0.1:1", "127.0.0.1:2"], "labels": {}}],
    )  # fmt: skip


def test_many_askers_make_one_look() -> None:
    looks = []

    def probe() -> Mapping[str, str]:
        looks.append(1)
        return {}

    readiness = Readiness((), probe)
    assert [readiness.lacks() for _ in range(50)] == [{}] * 50
    assert len(looks) <= 2


def test_a_port_in_use_is_named_with_what_to_do() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigError, match="metrics.base_port"),
    ):
        serve(
            "127.0.0.1",
            taken.getsockname()[1],
            LabelledView(CollectorRegistry(), {}),
            Readiness(()),
            "match 0",
        )
