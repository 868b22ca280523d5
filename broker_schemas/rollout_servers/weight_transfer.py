"""Sends published weights to rollout servers through their weight transfer endpoints [V-2].

The bytes are those of the published folder, so a server holds the same weights whichever way they came.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from broker_schemas.errors import RolloutServerError, RunStopped, ServerFailed, ServerUnavailable
from broker_schemas.rollout_servers.server_group import ServerGroup
from broker_schemas.rollout_servers.transfer_plan import Bucket, TensorPlace, plan_buckets, update_message
from broker_schemas.rollout_servers.vllm_http import VllmServer

LOG = logging.getLogger("rollstream.learner")
BUCKET_BYTES: Final = 64 * 1024 * 1024
# safetensors' names of number formats
DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass
class WeightTransfer:
    """The call ``(server, weights_path)`` that loads a published folder into a paused server.

    ``device`` is rank 0's. A group with each server is kept from one sync to the next and formed again when
    the server was restarted. With ``fallback`` a server that fails loads the folder by its path instead.
    """

    device: torch.device
    timeout_s: float
    fallback: bool = True
    bucket_bytes: int = BUCKET_BYTES
    _groups: dict[str, ServerGroup] = field(default_factory=dict)
    # rows of several servers would share one GPU's copies and one network card
    _sending: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, door: VllmServer, weights_path: str) -> None:
        """Return when the server holds the weights; raises RolloutServerError, RunStopped for our folder."""
        try:
            self._transfer(door, weights_path)
        except ServerUnavailable:
            self._leave(door)
            raise
        except RolloutServerError as exc:
            self._leave(door)
            if not self.fallback:
                raise
            LOG.warning("%s; loading %s by its path instead", exc, weights_path)
            door.load_weights(weights_path)

    def close(self) -> None:
        """Leave all groups."""
        for group in self._groups.values():
            group.close()
        self._groups.clear()

    def _transfer(self, door: VllmServer, weights_path: str) -> None:
        try:
            tensors = _PublishedTensors(Path(weights_path))
        except (OSError, SafetensorError, KeyError) as exc:
            raise RunStopped(f"published weights {weights_path}: not readable: {exc}") from exc
        buckets = plan_buckets(tensors.places, self.bucket_bytes)
        group = self._group(door)
        _start_update(door)
        try:
            self._send(door, group, buckets, tensors)
        except (OSError, SafetensorError) as exc:
            raise RunStopped(f"published weights {weights_path}: not readable: {exc}") from exc
        except RolloutServerError:
            with suppress(RolloutServerError):
                door.finish_weight_update()
            raise
        door.finish_weight_update()
        if problem := door.transfer_problem():
            raise ServerFailed(f"{door.base_url}: {problem}")

    def _send(
        self, door: VllmServer, group: ServerGroup, buckets: list[Bucket], tensors: _PublishedTensors
    ) -> None:
        with ThreadPoolExecutor(max_workers=1) as pool:
            receiving = pool.submit(door.update_weights, update_message(buckets))
            try:
                with self._sending:
                    for row in tensors.rows(buckets):
                        group.send(row.to(self.device) if group.transport == "nccl" else row)
            except BaseException:
                # workers that wait for the next row must hear that none will come
                self._leave(door)
                raise
            receiving.result()

    def _group(self, door: VllmServer) -> ServerGroup:
        """Return the group with a server, a new one where it knows none of ours."""
        known = self._groups.get(door.base_url)
        if known is not None and door.transfer_group() == known.name:
            return known
        self._leave(door)
        opened = ServerGroup.open(door, self.device, self.timeout_s)
        LOG.info("weights go to %s by %s", door.base_url, opened.transport)
        self._groups[door.base_url] = opened
        return opened

    def _leave(self, door: VllmServer) -> None:
        group = self._groups.pop(door.base_url, None)
        if group is not None:
            group.close()


def _start_update(door: VllmServer) -> None:
    try:
        door.start_weight_update()
    except ServerFailed:
        # an update that its learner never finished, since it died: put the layers together first
        door.finish_weight_update()
        door.start_weight_update()


class _PublishedTensors:
    """The tensors of a Hugging Face folder, in the order of its files and of the names in them."""

    def __init__(self, folder: Path) -> None:
        self._file_of: dict[str, Path] = {}
        self.places: list[TensorPlace] = []
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                    self._add(name, path, file.get_slice(name))
        if not self.places:
            raise OSError(f"no tensors in {folder}, expected *.safetensors")

    def rows(self, buckets: list[Bucket]) -> Iterator[torch.Tensor]:
        """Yield each bucket as one row of bytes (num_bytes,) uint8 on the CPU."""
        for bucket in buckets:
            row = torch.empty(bucket.num_bytes, dtype=torch.uint8)
            for place in bucket.places:
                end = place.offset_bytes + place.num_bytes
                row[place.offset_bytes : end] = self._read(place.name)
            yield row

    def _add(self, name: str, path: Path, header: Any) -> None:
        dtype, shape = DTYPES[header.get_dtype()], tuple(header.get_shape())
        self._file_of[name] = path
        self.places.append(
            TensorPlace(
                name=name,
                dtype=str(dtype).removeprefix("torch."),
                shape=shape,
                num_bytes=prod(shape) * dtype.itemsize,
            )
        )

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor.contiguous().reshape(-1).view(torch.uint8)
