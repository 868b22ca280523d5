"""Weights sent over a real gloo group: bytes, errors that end, and loading by path where a transfer fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from broker_schemas.errors import RunStopped, ServerFailed, ServerRefused, ServerUnavailable
from broker_schemas.rollout_servers.vllm_http import TRANSFER_ENGINE, VllmServer
from broker_schemas.rollout_servers.weight_label import WeightLabel
from broker_schemas.rollout_servers.weight_sync import load_into_servers
from broker_schemas.rollout_servers.weight_transfer import WeightTransfer, _PublishedTensors
from tests.builders.vllm_fakes import FakeVllm

c10d: Any = dist
CPU = torch.device("cpu")
TIMEOUT_S = 10.0


class ReceivingVllm(FakeVllm):
    """A fake server whose worker joins real groups and keeps what it receives.

    ``stops_after`` rows it leaves the group, as a worker does that cannot load what came.
    """

    def __init__(self, base_url: str) -> None:
        super().__init__(base_url)
        self.transfer_engine: str | None = TRANSFER_ENGINE
        self.group_name = ""
        self.group: Any = None
        self.store: Any = None
        self.is_updating = False
        self.stops_after: int | None = None
        self.problem: str | None = None
        self.received: dict[str, torch.Tensor] = {}
        self.num_rows = 0

    def _control(self, path: str, request: httpx.Request, body: dict[str, Any]) -> Any:
        if path == "/server_info":
            config = super()._control(path, request, body)["vllm_config"]
            return {"vllm_config": {**config, "weight_transfer_config": {"backend": self.transfer_engine}}}
        if path == "/init_weight_transfer_engine":
            self._join(body["init_info"])
            return {}
        if path == "/start_weight_update":
            assert not self.is_updating
            self.is_updating, self.problem = True, None
            return {}
        if path == "/update_weights":
            self._receive(body["update_info"])
            return {}
        if path == "/finish_weight_update":
            self.is_updating = False
            return {}
        if path == "/collective_rpc" and body["method"] == "transfer_group":
            return {"results": [self.group_name]}
        if path == "/collective_rpc" and body["method"] == "transfer_problem":
            return {"results": [self.problem]}
        return super()._control(path, request, body)

    def leave(self) -> None:
        group, self.group, self.store, self.group_name = self.group, None, None, ""
        if group is not None:
            group.abort()

    def _join(self, info: dict[str, Any]) -> None:
        self.leave()
        timeout = timedelta(seconds=info["timeout_s"])
        store = c10d.TCPStore(
            info["host"], info["port"], is_master=False, timeout=timeout, wait_for_workers=False
        )
        store.set("here/1", b"1")
        options = c10d.ProcessGroupGloo._Options()
        options._devices = [c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timeout
        self.group = c10d.ProcessGroupGloo(store, 1, info["world_size"], options)
        self.store = store
        self.group_name = info["group_name"]

    def _receive(self, info: dict[str, Any]) -> None:
        options = c10d.BroadcastOptions()
        options.rootRank = 0
        try:
            for number, (bucket, size) in enumerate(zip(info["buckets"], info["sizes"], strict=True)):
                if number == self.stops_after:
                    raise RuntimeError("cannot load what came")
                row = torch.empty(size, dtype=torch.uint8)
                self.group.broadcast([row], options).wait()
                self.num_rows += 1
                for name, dtype_name, shape, offset in bucket:
                    dtype = getattr(torch, dtype_name)
                    end = offset + torch.Size(shape).numel() * dtype.itemsize
                    self.received[name] = row[offset:end].view(dtype).view(shape)
        except RuntimeError as exc:
            self.problem = f"receiving weights: {exc}"
            self.leave()


@contextmanager
def listening() -> Iterator[str]:
    """Something that listens at the address of the server: the learner asks which interface leads there."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def server() -> Iterator[ReceivingVllm]:
    with listening() as base_url:
        made = ReceivingVllm(base_url)
        yield made
        made.leave()


@pytest.fixture
def make_transfer() -> Iterator[Callable[..., WeightTransfer]]:
    made: list[WeightTransfer] = []

    def make(**settings: Any) -> WeightTransfer:
        made.append(WeightTransfer(device=CPU, timeout_s=TIMEOUT_S, **settings))
        return made[-1]

    yield make
    for transfer in made:
        transfer.close()


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "embed": torch.randn(50, 8, generator=generator),
        "half": torch.randn(7, 3, generator=generator).to(torch.bfloat16),
        "scale": torch.tensor(2.5),
        "none": torch.empty(0, 4),
    }
    other = {"head": torch.randn(4, 8, generator=generator)}
    save_file(tensors, tmp_path / "model-00001-of-00002.safetensors")
    save_file(other, tmp_path / "model-00002-of-00002.safetensors")
    return {name: tensor for name, tensor in (tensors | other).items() if tensor.numel()}


@pytest.mark.req("V-2")
@pytest.mark.parametrize("bucket_bytes", [1, 256, 1 << 20])
def test_a_server_receives_the_published_bytes_however_they_are_cut(
    server: ReceivingVllm,
    make_transfer: Callable[..., WeightTransfer],
    weights: dict[str, torch.Tensor],
    tmp_path: Path,
    bucket_bytes: int,
) -> None:
    make_transfer(bucket_bytes=bucket_bytes, fallback=False)(server.door(), str(tmp_path))

    assert set(server.received) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(server.received[name], tensor), name
        assert server.received[name].dtype == tensor.dtype
    assert not server.is_updating
    assert server.num_rows == (len(weights) if bucket_bytes == 1 else server.num_rows)


@pytest.mark.req("V-2")
def test_the_group_is_kept_from_sync_to_sync_and_formed_again_after_a_restart(
    server: ReceivingVllm,
    make_transfer: Callable[..., WeightTransfer],
    weights: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    transfer = make_transfer(fallback=False)
    transfer(server.door(), str(tmp_path))
    first = server.group_name
    transfer(server.door(), str(tmp_path))
    assert server.group_name == first

    # a new process knows no group
    server.leave()
    server.received = {}
    transfer(server.door(), str(tmp_path))

    assert server.group_name not in ("", first)
    assert set(server.received) == set(weights)


@pytest.mark.req("V-2")
@pytest.mark.usefixtures("weights")
def test_a_worker_that_leaves_in_the_middle_is_an_error_at_once_or_the_folder_is_loaded_by_its_path(
    server: ReceivingVllm, make_transfer: Callable[..., WeightTransfer], tmp_path: Path
) -> None:
    server.stops_after = 1
    started = time.monotonic()
    with pytest.raises(ServerFailed, match="a worker is gone|cannot load what came"):
        make_transfer(bucket_bytes=1, fallback=False)(server.door(), str(tmp_path))
    assert time.monotonic() - started < TIMEOUT_S, "we waited for our deadline"
    assert not server.is_updating, "half an update must not meet the next"
    assert "/collective_rpc load_published_weights" not in str(server.log)

    make_transfer(bucket_bytes=1)(server.door(), str(tmp_path))
    assert server.log[-1] == f"/collective_rpc load_published_weights {tmp_path}"


@pytest.mark.req("V-2")
@pytest.mark.usefixtures("weights")
def test_a_server_that_was_not_started_for_transfers_is_told_so_or_loads_by_path(
    server: ReceivingVllm, make_transfer: Callable[..., WeightTransfer], tmp_path: Path
) -> None:
    server.transfer_engine = None
    with pytest.raises(ServerRefused, match=r"vllm\.sync\.mode transfer"):
        make_transfer(fallback=False)(server.door(), str(tmp_path))

    make_transfer()(server.door(), str(tmp_path))
    assert server.log[-1] == f"/collective_rpc load_published_weights {tmp_path}"


@pytest.mark.req("V-2")
@pytest.mark.usefixtures("weights")
def test_an_update_that_a_dead_learner_left_open_is_ended_first(
    server: ReceivingVllm, make_transfer: Callable[..., WeightTransfer], tmp_path: Path
) -> None:
    server.is_updating = True

    def refuse_twice(request: httpx.Request) -> httpx.Response | None:
        if request.url.path == "/start_weight_update" and server.is_updating:
            return httpx.Response(500, text="start_weight_update called while already active")
        return None

    server.faults.append(refuse_twice)
    make_transfer(fallback=False)(server.door(), str(tmp_path))

    assert set(server.received) >= {"embed", "head"}


@pytest.mark.req("V-2", "Q-11")
@pytest.mark.usefixtures("weights")
def test_a_worker_that_never_comes_ends_with_its_reason(server: ReceivingVllm, tmp_path: Path) -> None:
    def never_join(info: dict[str, Any]) -> None:
        server.problem = "joining the group: no route to host"

    server._join = never_join  # type: ignore[method-assign]
    transfer = WeightTransfer(device=CPU, timeout_s=5.0, fallback=False)

    with pytest.raises(ServerFailed, match="no route to host"):
        transfer(server.door(), str(tmp_path))


@pytest.mark.req("V-2")
@pytest.mark.usefixtures("weights")
def test_a_server_that_is_down_is_no_reason_to_load_by_path(
    make_transfer: Callable[..., WeightTransfer], tmp_path: Path
) -> None:
    with listening() as base_url:
        pass
    door = VllmServer(base_url, timeout_s=2.0)

    with pytest.raises(ServerUnavailable):
        make_transfer()(door, str(tmp_path))
    door.close()


@pytest.mark.req("V-2")
def test_a_folder_of_ours_that_cannot_be_read_stops_the_run(
    server: ReceivingVllm, make_transfer: Callable[..., WeightTransfer], tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")

    with pytest.raises(RunStopped, match="not readable"):
        make_transfer()(server.door(), str(tmp_path))
    assert "/start_weight_update" not in server.log


@pytest.mark.req("V-2", "Q-11")
@pytest.mark.usefixtures("weights")
def test_a_disk_that_fails_in_the_middle_stops_the_run_and_the_server_hears_of_it_at_once(
    server: ReceivingVllm,
    make_transfer: Callable[..., WeightTransfer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = []
    read = _PublishedTensors._read

    def fail_later(tensors: _PublishedTensors, name: str) -> torch.Tensor:
        reads.append(name)
        if len(reads) > 2:
            raise OSError("input/output error")
        return read(tensors, name)

    monkeypatch.setattr(_PublishedTensors, "_read", fail_later)
    started = time.monotonic()

    with pytest.raises(RunStopped, match="input/output error"):
        make_transfer(bucket_bytes=1)(server.door(), str(tmp_path))

    assert server.num_rows == 2
    assert server.problem is not None
    assert time.monotonic() - started < TIMEOUT_S, "the worker waited for its deadline"


@pytest.mark.req("V-2")
@pytest.mark.usefixtures("weights")
def test_a_sync_by_transfer_keeps_the_order_of_every_sync(
    server: ReceivingVllm, make_transfer: Callable[..., WeightTransfer], tmp_path: Path
) -> None:
    label = WeightLabel(policy_version=3, weights_path=str(tmp_path))

    failures = load_into_servers([server.door()], label, "wait", make_transfer(fallback=False))

    assert failures == {}
    steps = [line.split()[0] for line in server.log if "collective_rpc" not in line]
    assert steps == [
        "/pause?mode=wait",
        "/update_weight_version",
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache?reset_running_requests=true",
        "/reset_encoder_cache",
        "/update_weight_version",
        "/resume",
    ]
    assert server.label == str(label)
