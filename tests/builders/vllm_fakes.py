"""A vLLM server in memory: replies as a real one (0.32) gave them, and faults it won't show on demand."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx

from broker_schemas.rollout_servers.vllm_http import (
    GENERATE_PATH,
    LOADER,
    LOADER_CLASS,
    ROWS_LOADER,
    VllmServer,
)

END_ID = 603
Fault = Callable[[httpx.Request], httpx.Response | None]


def tokens_reply(
    prompt_ids: list[int], response_ids: list[int], version: str = "1:/p/v1", **changes: Any
) -> dict[str, Any]:
    """The reply of the endpoint that takes token ids; ``changes`` replace fields of its choice."""
    choice = {
        "index": 0,
        "finish_reason": "stop" if response_ids and response_ids[-1] == END_ID else "length",
        "stop_reason": None,
        "token_ids": response_ids,
        "routed_experts": None,
        "sampling_mask": None,
        "weight_versions": [{"version": version, "start": 0, "end": len(response_ids)}],
        "logprobs": {
            "content": [
                {"token_id": token, "logprob": -0.5 - place, "rank": 1, "top_logprobs": []}
                for place, token in enumerate(response_ids)
            ]
        },
    } | changes
    return {
        "request_id": "generate-tokens-8b020ca94bb66e43",
        "model": "policy",
        "prompt_token_ids": prompt_ids,
        "mm_placeholders": None,
        "output_mode": "tokens",
        "choices": [choice],
    }


def chat_reply(prompt_ids: list[int], response_ids: list[int], **changes: Any) -> dict[str, Any]:
    """The reply of the chat endpoint with ``return_token_ids``: it does not say which weights it used."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "..."},
        "finish_reason": "stop" if response_ids and response_ids[-1] == END_ID else "length",
        "stop_reason": END_ID if response_ids and response_ids[-1] == END_ID else None,
        "token_ids": response_ids,
        "logprobs": {
            "content": [{"token": "c", "logprob": -0.5, "bytes": [99], "top_logprobs": []}]
            * len(response_ids)
        },
    } | changes
    return {"id": "chatcmpl-1", "model": "policy", "prompt_token_ids": prompt_ids, "choices": [choice]}


class FakeVllm:
    """One server. ``faults`` are asked first with every request; what they return is the answer.

    ``log`` keeps what was called, ``answer`` makes the reply to a generation request.
    """

    def __init__(
        self, base_url: str = "http://one:8000", *, label: str = "default", world_size: int = 1
    ) -> None:
        self.base_url = base_url
        self.label = label
        self.world_size = world_size
        self.is_up = True
        self.is_paused = False
        self.device = "cpu"
        self.loader = LOADER_CLASS
        self.takes_token_ids = True
        self.max_model_len = 512
        self.load_problem: str | None = None
        self.adapters: list[str] = []
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.answer: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: tokens_reply(
            body["token_ids"], [7, END_ID], self.label
        )

    def door(self, timeout_s: float = 5.0, *, takes_adapters: bool = False) -> VllmServer:
        transport = httpx.MockTransport(self.handle)
        return VllmServer(
            self.base_url, timeout_s=timeout_s, takes_adapters=takes_adapters, transport=transport
        )

    def handle(self, request: httpx.Request) -> httpx.Response:
        if not self.is_up:
            raise httpx.ConnectError("[Errno 111] Connection refused", request=request)
        for fault in self.faults:
            if (reply := fault(request)) is not None:
                return reply
        body = json.loads(request.content) if request.content else {}
        return self._reply(request, body)

    def _reply(self, request: httpx.Request, body: dict[str, Any]) -> httpx.Response:
        path, is_get = request.url.path, request.method == "GET"
        if path == GENERATE_PATH and is_get:
            return httpx.Response(405 if self.takes_token_ids else 403, json={"detail": "no"})
        if path in (GENERATE_PATH, "/v1/chat/completions"):
            return httpx.Response(200, json=self.answer(body))
        if not is_get:
            self.log.append(path + (f"?{request.url.query.decode()}" if request.url.query else ""))
        if path.endswith("_lora_adapter"):
            return self._change_adapters(path, body)
        return httpx.Response(200, json=self._control(path, request, body))

    def _change_adapters(self, path: str, body: dict[str, Any]) -> httpx.Response:
        name = body["lora_name"]
        self.log[-1] += f" {name}"
        if path == "/v1/load_lora_adapter":
            assert body["load_inplace"] is True
            self.adapters = [*(held for held in self.adapters if held != name), name]
        else:
            self.adapters.remove(name)
        # a sentence, not JSON
        return httpx.Response(200, text=f"Success: LoRA adapter '{name}'")

    def _control(self, path: str, request: httpx.Request, body: dict[str, Any]) -> Any:
        if path == "/pause":
            self.is_paused = True
        elif path == "/resume":
            self.is_paused = False
        elif path == "/update_weight_version":
            self.label = body["new_version"]
            self.log[-1] += f" {self.label}"
        elif path == "/collective_rpc":
            assert body["method"] in (LOADER, ROWS_LOADER, "reload_weights")
            self.log[-1] += f" {body['method']} {body['kwargs']['weights_path']}"
            return {"results": [self.load_problem]}
        return {
            "/get_world_size": {"world_size": self.world_size},
            "/weight_info": {"weight_version": self.label},
            "/is_paused": {"is_paused": self.is_paused},
            "/v1/models": {
                "data": [
                    {"id": "policy", "max_model_len": self.max_model_len},
                    *({"id": name, "parent": "policy", "max_model_len": None} for name in self.adapters),
                ]
            },
            "/server_info": {
                "vllm_config": {
                    "parallel_config": {"worker_extension_cls": self.loader},
                    "device_config": {"device": self.device},
                }
            },
            "/reset_prefix_cache": {"success": True},
        }.get(path, {})
