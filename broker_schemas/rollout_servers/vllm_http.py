"""The thin HTTP door to one vLLM server: requests with deadlines, errors as ours, the endpoints we use.

It knows no prompts and no policies; producers generate through it, the learner loads weights through it.
httpx is imported on first use only.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final, Literal

from broker_schemas.errors import ServerFailed, ServerRefused, ServerUnavailable

if TYPE_CHECKING:
    import httpx

    from broker_schemas.rollout_servers.exchange_deadline import ExchangeDeadline

PauseMode = Literal["wait", "keep"]
CONNECT_TIMEOUT_S: Final = 5.0
LOOK_TIMEOUT_S: Final = 10.0
METHOD_NOT_ALLOWED: Final = 405
MAX_REPLY_BYTES: Final = 256 * 1024 * 1024
GENERATE_PATH: Final = "/inference/v1/generate"
CHAT_PATH: Final = "/v1/chat/completions"
LOADER: Final = "load_published_weights"
LOADER_CLASS: Final = "rollstream_vllm_worker.PublishedWeights"
ROWS_LOADER: Final = "load_coordinate_rows"
TRANSFER_ENGINE: Final = "rollstream"
ADAPTER_PREFIX: Final = "policy-"
# the server is there but asks to come again
_TRY_AGAIN: Final = frozenset({408, 425, 429})


@contextmanager
def server_errors(where: str) -> Iterator[None]:
    """Turn what httpx raises into ours; ``where`` names server and endpoint."""
    import httpx

    try:
        yield
    except httpx.TimeoutException as exc:
        raise ServerUnavailable(
            f"{where}: no answer in time ({type(exc).__name__}); is the server overloaded?"
        ) from exc
    except (httpx.NetworkError, httpx.ProxyError, httpx.RemoteProtocolError) as exc:
        raise ServerUnavailable(
            f"{where}: no connection ({type(exc).__name__}: {exc}); is it running?"
        ) from exc
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as exc:
        raise ServerFailed(f"{where}: {type(exc).__name__}: {exc}; expected an HTTP reply") from exc


class VllmServer:
    """One server at ``base_url``. Safe to share between threads, except for ``reconnect`` and ``close``.

    ``timeout_s`` bounds control requests as a whole, from connecting to the last byte. ``takes_adapters``:
    published folders hold adapters of the model that it serves.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float,
        max_connections: int = 64,
        takes_adapters: bool = False,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.timeout_s = timeout_s
        self.takes_adapters = takes_adapters
        self._max_connections = max_connections
        self._transport = transport
        self._client: httpx.Client | None = None
        self._opening = threading.Lock()
        self._deadline: ExchangeDeadline

    def reconnect(self) -> None:
        """Drop all connections; the next request opens a new one."""
        client, self._client = self._client, None
        if client is not None and self._transport is None:
            client.close()

    def close(self) -> None:
        """Drop all connections."""
        self.reconnect()

    def get(self, path: str, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Return the JSON object at ``path``, empty for an empty reply; raises RolloutServerError."""
        return self._request("GET", path, None, timeout_s)

    def post(
        self, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Return the JSON object that ``path`` answers to ``body``; raises RolloutServerError."""
        return self._request("POST", path, body, timeout_s)

    def is_healthy(self) -> bool:
        """Return whether the server answers and its engine lives."""
        try:
            self.get("/health", timeout_s=LOOK_TIMEOUT_S)
        except (ServerUnavailable, ServerFailed):
            return False
        return True

    def world_size(self) -> int:
        """Return the number of GPUs (or CPU workers) of the server."""
        return self._number(self.get("/get_world_size", timeout_s=LOOK_TIMEOUT_S), "world_size")

    def model(self) -> tuple[str, int]:
        """Return (name of the served model, most tokens of prompt and response together)."""
        models = self.get("/v1/models", timeout_s=LOOK_TIMEOUT_S).get("data")
        if not isinstance(models, list) or not models or not isinstance(models[0], dict):
            raise ServerFailed(f"{self.base_url}/v1/models: no model in the reply, expected at least one")
        return str(models[0].get("id")), self._number(models[0], "max_model_len")

    def takes_token_ids(self) -> bool:
        """Return whether the endpoint that takes token ids is switched on (``--enable-scale-out``)."""
        try:
            self.get(GENERATE_PATH, timeout_s=LOOK_TIMEOUT_S)
        except ServerRefused as exc:
            # where it is on, it answers a GET with "method not allowed"
            return exc.status == METHOD_NOT_ALLOWED
        return True

    def label(self) -> str:
        """Return the text that the server keeps with its weights."""
        return str(self.get("/weight_info", timeout_s=LOOK_TIMEOUT_S).get("weight_version"))

    def is_paused(self) -> bool:
        """Return whether generation is paused."""
        return bool(self.get("/is_paused", timeout_s=LOOK_TIMEOUT_S).get("is_paused"))

    def set_label(self, text: str) -> None:
        """Set the label and read it back; raises ServerFailed when the server says another."""
        self.post("/update_weight_version", {"new_version": text})
        if (seen := self.label()) != text:
            raise ServerFailed(f"{self.base_url}: weight label is {seen!r} after it was set to {text!r}")

    def pause(self, mode: PauseMode) -> None:
        """Stop generating: ``wait`` ends what is in flight first, ``keep`` freezes it.

        The server's own default would abort requests, so the mode is always said.
        """
        self.post(f"/pause?mode={mode}")

    def resume(self) -> None:
        """Generate again."""
        self.post("/resume")

    def load_weights(self, weights_path: str) -> None:
        """Load a published folder by its path on the server's machine: a model's weights, or an adapter.

        Raises ServerRefused, and leaves the server as it was, where it does not see the folder, or where it
        runs on CPU without our worker extension: its output layer would keep the old weights.
        """
        if self.takes_adapters:
            self._load_adapter(weights_path)
            return
        self._run_on_workers(LOADER if self._has_loader() else "reload_weights", weights_path)

    def adapters(self) -> list[str]:
        """Return the names of the adapters that it holds, oldest first."""
        models = self.get("/v1/models", timeout_s=LOOK_TIMEOUT_S).get("data") or []
        names = [str(entry.get("id")) for entry in models if isinstance(entry, dict)]
        return [name for name in names if name.startswith(ADAPTER_PREFIX)]

    def _load_adapter(self, weights_path: str) -> None:
        name = adapter_name(weights_path)
        body = {"lora_name": name, "lora_path": weights_path, "load_inplace": True}
        self._request("POST", "/v1/load_lora_adapter", body, None, answers_json=False)
        self._run_on_workers(ROWS_LOADER, weights_path)
        # the one before stays for rollouts that were asked of it a moment ago
        for old in [held for held in self.adapters() if held != name][:-1]:
            self._request("POST", "/v1/unload_lora_adapter", {"lora_name": old}, None, answers_json=False)

    def _run_on_workers(self, method: str, weights_path: str) -> None:
        reply = self.post("/collective_rpc", {"method": method, "kwargs": {"weights_path": weights_path}})
        problems = [str(result) for result in reply.get("results") or [] if result is not None]
        if problems:
            raise ServerRefused(f"{self.base_url}: {problems[0]}")

    def takes_transfers(self) -> bool:
        """Return whether it was started to receive weights from the learner."""
        return bool(self._setting("weight_transfer_config", "backend") == TRANSFER_ENGINE)

    def init_weight_transfer(self, meeting: Mapping[str, Any]) -> None:
        """Let the workers join the group at ``meeting``; returns when they have, or have given up.

        Raises ServerRefused where the server was not started for transfers.
        """
        if not self.takes_transfers():
            raise ServerRefused(
                f"{self.base_url}: takes no weight transfers; start it with 'rollstream serve vllm' and "
                "vllm.sync.mode transfer"
            )
        self.post("/init_weight_transfer_engine", {"init_info": dict(meeting)})

    def start_weight_update(self) -> None:
        """Take the layers apart for new weights."""
        self.post("/start_weight_update")

    def update_weights(self, message: Mapping[str, Any]) -> None:
        """Let the workers receive what ``message`` describes; returns when they have, or have given up."""
        self.post("/update_weights", {"update_info": dict(message)})

    def finish_weight_update(self) -> None:
        """Put the layers together again."""
        self.post("/finish_weight_update")

    def transfer_group(self) -> str:
        """Return the name of the group that all workers are in; empty for none or several."""
        names = {str(name) for name in self._ask_workers("transfer_group")}
        return names.pop() if len(names) == 1 else ""

    def transfer_problem(self) -> str | None:
        """Return what went wrong with the last transfer in the first worker that knows, None for nothing."""
        problems = [str(found) for found in self._ask_workers("transfer_problem") if found is not None]
        return problems[0] if problems else None

    def device(self) -> str:
        """Return what the server computes on, such as ``cpu`` or ``cuda``."""
        return str(self._setting("device_config", "device")).partition(":")[0]

    def _ask_workers(self, method: str) -> list[Any]:
        results = self.post("/collective_rpc", {"method": method}).get("results")
        return results if isinstance(results, list) else []

    def _setting(self, section: str, name: str) -> Any:
        info = self.get("/server_info?config_format=json", timeout_s=LOOK_TIMEOUT_S).get("vllm_config")
        found = info.get(section) if isinstance(info, dict) else None
        return found.get(name) if isinstance(found, dict) else None

    def _has_loader(self) -> bool:
        if self._setting("parallel_config", "worker_extension_cls") == LOADER_CLASS:
            return True
        if self.device() == "cpu":
            raise ServerRefused(
                f"{self.base_url}: a CPU server without {LOADER_CLASS} keeps the old weights in its output "
                "layer; start it with 'rollstream serve vllm'"
            )
        return False

    def forget_old_weights(self) -> None:
        """Clear what was computed with the old weights: keys and values of frozen requests, image features.

        Frozen requests are computed again from their tokens when generation goes on.
        """
        path = "/reset_prefix_cache?reset_running_requests=true"
        if self.post(path).get("success") is not True:
            raise ServerFailed(f"{self.base_url}: keys and values of the old weights could not be cleared")
        self.post("/reset_encoder_cache")

    def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout_s: float | None,
        *,
        answers_json: bool = True,
    ) -> dict[str, Any]:
        import httpx

        limit_s = self.timeout_s if timeout_s is None else timeout_s
        where = f"{method} {self.base_url}{path.partition('?')[0]}"
        give_up_at = time.monotonic() + limit_s
        timeout = httpx.Timeout(limit_s, connect=min(CONNECT_TIMEOUT_S, limit_s))
        client = self._open()
        with (
            server_errors(where),
            self._deadline.within(limit_s),
            client.stream(method, path, json=body, timeout=timeout) as reply,
        ):
            raw = bytearray()
            for piece in reply.iter_bytes():
                raw += piece
                if time.monotonic() > give_up_at:
                    raise ServerUnavailable(f"{where}: reply not complete after {limit_s:g} s")
                if len(raw) > MAX_REPLY_BYTES:
                    raise ServerFailed(f"{where}: reply over {MAX_REPLY_BYTES} bytes, expected less")
            status = reply.status_code
        return _read_reply(where, status, bytes(raw), answers_json=answers_json)

    def _open(self) -> httpx.Client:
        import httpx

        with self._opening:
            if self._client is None:
                from broker_schemas.rollout_servers.exchange_deadline import (
                    ExchangeDeadline,
                    deadline_transport,
                )

                most = self._max_connections
                limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
                self._deadline = ExchangeDeadline()
                transport = self._transport or deadline_transport(self._deadline, limits)
                # a proxy of the environment knows nothing of servers beside us
                self._client = httpx.Client(base_url=self.base_url, transport=transport, trust_env=False)
            return self._client

    def _number(self, body: Mapping[str, Any], name: str) -> int:
        value = body.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ServerFailed(f"{self.base_url}: {name} is {value!r}, expected a positive number")
        return value


def adapter_name(weights_path: str) -> str:
    """Return the name that the adapter in a published folder ``v<N>`` is asked for by."""
    return ADAPTER_PREFIX + PurePath(weights_path).name


def _read_reply(where: str, status: int, raw: bytes, *, answers_json: bool) -> dict[str, Any]:
    text = raw[:500].decode("utf-8", "replace")
    if status in _TRY_AGAIN or status >= 500:
        raise ServerFailed(f"{where}: status {status} ({text}); look at the server's log")
    if status >= 300:
        raise ServerRefused(
            f"{where}: status {status} ({text}); was it started by 'rollstream serve vllm'?", status=status
        )
    if not answers_json or not raw.strip():
        return {}
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise ServerFailed(f"{where}: reply is no JSON ({text!r:.200})") from exc
    if not isinstance(body, dict):
        raise ServerFailed(f"{where}: reply is a {type(body).__name__}, expected a JSON object")
    return body
