"""Rollouts by vLLM servers over HTTP: one or many, weighted slices, order and seeds kept [M-2, V-1]."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, repeat
from typing import TYPE_CHECKING, Final

from broker_schemas.broker.policy import PublishedPolicy
from broker_schemas.errors import ServerUnavailable
from broker_schemas.method.dataset import Sample
from broker_schemas.method.images import ImageProcessor
from broker_schemas.method.prompt import PromptBuilder
from broker_schemas.records.records import Purpose
from broker_schemas.rollout_servers.server_slots import TakeSlots
from broker_schemas.rollout_servers.vllm_http import CHAT_PATH, GENERATE_PATH
from broker_schemas.rollout_servers.weight_label import WeightLabel, parse_label
from producers.chunking import slice_requests
from producers.rollout_backend import DecodingSettings, Generation
from producers.vllm_client import RetrySettings, send_batch
from producers.vllm_requests import PromptRequest, build_body, read_generation
from producers.vllm_servers import LiveServer, ServerFleet, check_room

if TYPE_CHECKING:
    from PIL.Image import Image

PATHS: Final = {"tokens": GENERATE_PATH, "chat": CHAT_PATH}


@dataclass(frozen=True, kw_only=True)
class VllmBackendSettings:
    """``decode_batch_size`` caps the rollouts in flight per GPU of a server, over all producers [S-3]."""

    decoding: DecodingSettings
    retry: RetrySettings
    decode_batch_size: int


class VllmBackend:
    """Generates on the servers of a fleet with the weights that they hold."""

    def __init__(
        self,
        prompts: PromptBuilder,
        images: ImageProcessor,
        fleet: ServerFleet,
        settings: VllmBackendSettings,
        slots: TakeSlots,
        *,
        evaluation_images: ImageProcessor | None = None,
    ) -> None:
        self._prompts = prompts
        self._images = images
        self._evaluation_images = evaluation_images or images
        self._fleet = fleet
        self._settings = settings
        self._slots = slots
        self._servers: list[LiveServer] = []
        self._policy_version = -1
        self._unexpanded: dict[int, tuple[int, ...]] = {}

    @property
    def policy_version(self) -> int:
        return self._policy_version

    @property
    def processor_fingerprint(self) -> str:
        return self._images.fingerprint

    def follow(self, policy: PublishedPolicy) -> None:
        """Find the servers that answer and see that each holds ``policy``; raises RolloutServerError.

        Asked before every request, also for a policy that is in use: a server may have been restarted.
        """
        self._policy_version = -1  # until all is well: what a server holds after a failure is not known
        self._servers = self._fleet.follow(policy)
        self._policy_version = min(server.weights.policy_version for server in self._servers)

    def generate(
        self, samples: Sequence[Sample], seeds: Sequence[int], *, purpose: Purpose = "train"
    ) -> list[Generation]:
        """Generate one rollout a sample, in order, divided between the servers by their world sizes.

        Raises RolloutServerError, or DataError for an unreadable image.
        """
        if not samples:
            return []
        if not self._servers:
            raise ServerUnavailable("generation: no rollout server yet; follow() a published policy first")
        images = self._images if purpose == "train" else self._evaluation_images
        requests = [self._request(sample, seed, images) for sample, seed in zip(samples, seeds, strict=True)]
        longest = max(len(request.prompt_token_ids) for request in requests)
        check_room(self._servers, longest + self._settings.decoding.max_new_tokens)
        sizes = [server.world_size for server in self._servers]
        shares = slice_requests(len(requests), sizes, 1)[0]
        ends = accumulate(shares)
        slices = [requests[end - share : end] for end, share in zip(ends, shares, strict=True)]
        with ThreadPoolExecutor(max_workers=len(slices)) as pool:
            parts = list(pool.map(self._generate_on, self._servers, slices, repeat(purpose)))
        return [generation for part in parts for generation in part]

    def close(self) -> None:
        self._fleet.close()

    def _generate_on(
        self, server: LiveServer, requests: Sequence[PromptRequest], purpose: Purpose
    ) -> list[Generation]:
        decoding = self._settings.decoding.for_purpose(purpose)
        generations: list[Generation] = []
        num_places = self._settings.decode_batch_size * server.world_size
        while left := requests[len(generations) :]:
            with self._slots(server.door.base_url, len(left), num_places) as num_given:
                weights = self._weights_before(server)
                generations += send_batch(
                    left[:num_given],
                    lambda request, weights=weights: self._send(  # type: ignore[misc]
                        server, request, decoding, weights
                    ),
                    reconnect=server.door.reconnect,
                    settings=self._settings.retry,
                )
        return generations

    def _weights_before(self, server: LiveServer) -> WeightLabel | None:
        # the chat endpoint does not say which weights it used: those before the request are the lowest
        return parse_label(server.door.label()) if server.dialect == "chat" else None

    def _send(
        self,
        server: LiveServer,
        request: PromptRequest,
        decoding: DecodingSettings,
        weights: WeightLabel | None,
    ) -> Generation:
        path = PATHS[server.dialect]
        body = build_body(request, server.model, decoding, server.dialect)
        reply = server.door.post(path, body, timeout_s=self._settings.retry.request_timeout_s)
        where = f"POST {server.door.base_url}{path}"
        generation = read_generation(reply, request, decoding, where=where, weights=weights)
        if server.adapter_version is None:
            return generation
        # a sync meanwhile moved the server's label, not the adapter that this request names
        return replace(generation, policy_version=server.adapter_version, version_spans=())

    def _request(self, sample: Sample, seed: int, images: ImageProcessor) -> PromptRequest:
        shown = [images.resized(path) for path in sample.image_paths]
        grids = tuple(grid for _, grid in shown)
        return PromptRequest(
            prompt_token_ids=self._prompts.build_ids(grids),
            unexpanded_ids=self._unexpanded_ids(len(shown)),
            messages=self._prompts.messages(len(shown)),
            image_urls=tuple(_data_url(image) for image, _ in shown),
            grids_thw=grids,
            seed=seed,
            end_token_id=self._prompts.end_token_id,
        )

    def _unexpanded_ids(self, num_images: int) -> tuple[int, ...]:
        if num_images not in self._unexpanded:
            text = self._prompts.build_text(num_images)
            encoded = self._prompts.tokenizer.encode(text, add_special_tokens=False)
            self._unexpanded[num_images] = tuple(encoded.ids)
        return self._unexpanded[num_images]


def _data_url(image: Image) -> str:
    buffer = io.BytesIO()
    # lossless, so that the server sees the pixels that training sees
    image.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
