"""The files of a checkpoint as torch.distributed.checkpoint sees them: safetensors alone, nothing pickled.

Each rank writes its own files and needs no other to do so; where a block of a tensor lies in the whole of it
stands in the header of its file. Torch's loader reads any split of the tensors from any other.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from broker_schemas.errors import RunStopped
from learner.tensor_files import DTYPES, WrittenFile, write_tensor_file

WEIGHTS: Final = "weights"
OPTIMIZER: Final = "optimizer"
TENSORS: Final = "tensors"
"""The one key of what is saved: torch writes a log line about every key."""
_FILES: Final = {WEIGHTS: "model*.safetensors", OPTIMIZER: "optimizer*.safetensors"}
_BLOCKS: Final = "blocks"
_REMEDY: Final = "remove this checkpoint to resume from the one before"


@dataclass(frozen=True, kw_only=True)
class Block:
    """Where a tensor of this rank goes: into ``file``, at ``offsets`` of a whole of ``whole_shape``."""

    file: str
    whole_shape: tuple[int, ...]
    offsets: tuple[int, ...]


def with_one_process_expected() -> None:
    """Keep torch from warning that each rank saves and loads by itself."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def whole_block(file: str, tensor: Tensor) -> Block:
    """Return the block that is all of ``tensor``."""
    return Block(file=file, whole_shape=tuple(tensor.shape), offsets=(0,) * tensor.ndim)


class BlockPlanner(SavePlanner):
    """Saves every tensor of the state at its block; keys are ``weights/<name>`` and ``optimizer/<name>``."""

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        self._blocks = blocks
        self._state: Mapping[str, Any] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self._state = state_dict[TENSORS]

    def create_local_plan(self) -> SavePlan:
        return SavePlan([self._item(key, tensor) for key, tensor in self._state.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Every rank plans for itself; what is where is read from the files."""
        return all_plans, Metadata(state_dict_metadata={})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return torch.as_tensor(self._state[write_item.index.fqn])

    def _item(self, key: str, tensor: Tensor) -> WriteItem:
        block = self._blocks[key]
        return WriteItem(
            index=MetadataIndex(key, block.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=torch.Size(block.offsets), sizes=tensor.shape),
                properties=TensorProperties(dtype=tensor.dtype),
                size=torch.Size(block.whole_shape),
            ),
        )


class BlockWriter(StorageWriter):
    """Writes this rank's blocks below ``folder``; ``written`` tells of each file once it is on the disk."""

    def __init__(self, folder: Path, blocks: Mapping[str, Block]) -> None:
        self._folder = folder
        self._blocks = blocks
        self.written: dict[str, WrittenFile] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.written = {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write one file after the other; raises OSError."""
        by_file: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for item in plan.items:
            key = item.index.fqn
            by_file[self._blocks[key].file][key] = torch.as_tensor(planner.resolve_data(item))
        for file, tensors in by_file.items():
            self.written[file] = self._write(file, tensors)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def _write(self, file: str, tensors: Mapping[str, Tensor]) -> WrittenFile:
        parts = {
            _name(key): [block.offsets, block.whole_shape]
            for key in tensors
            if (block := self._blocks[key]).whole_shape != tuple(tensors[key].shape)
        }
        metadata = {_BLOCKS: json.dumps(parts)} if parts else {}
        return write_tensor_file(
            self._folder / file, {_name(key): tensor for key, tensor in tensors.items()}, metadata
        )

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing is left to write: headers say where each block lies."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class _Stored:
    path: Path
    name: str


class BlockReader(StorageReader):
    """Reads the blocks of a checkpoint, of each only the part that is asked for."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._stored: dict[MetadataIndex, _Stored] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between two loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the headers say is there.

        Raises RunStopped for a file that cannot be read, or blocks that do not make a whole tensor.
        """
        found: dict[str, TensorStorageMetadata] = {}
        for kind, pattern in _FILES.items():
            for path in sorted(self._checkpoint.glob(pattern)):
                self._read_header(kind, path, found)
        for key, tensor in found.items():
            held = sum(chunk.sizes.numel() for chunk in tensor.chunks)
            if held != tensor.size.numel():
                raise RunStopped(
                    f"{self._checkpoint}: {key} is there with {held} of {tensor.size.numel()} numbers, "
                    f"expected the files of every rank; {_REMEDY}"
                )
        return Metadata(state_dict_metadata=dict(found), storage_data=self._stored)

    def _read_header(self, kind: str, path: Path, found: dict[str, TensorStorageMetadata]) -> None:
        with _opened(path) as file:
            parts = json.loads((file.metadata() or {}).get(_BLOCKS, "{}"))
            for name in file.keys():  # noqa: SIM118  the library's file is no dictionary
                piece = file.get_slice(name)
                sizes = torch.Size(piece.get_shape())
                offsets, whole = parts.get(name, [[0] * len(sizes), sizes])
                key = f"{kind}/{name}"
                tensor = found.setdefault(
                    key,
                    TensorStorageMetadata(
                        properties=TensorProperties(dtype=DTYPES[piece.get_dtype()]),
                        size=torch.Size(whole),
                        chunks=[],
                    ),
                )
                tensor.chunks.append(ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=sizes))
                self._stored[MetadataIndex(key, offsets)] = _Stored(path=path, name=name)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kw: Any) -> None:
        """The headers are read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[Path, list[Any]] = defaultdict(list)
        for item in plan.items:
            by_file[self._stored[item.storage_index].path].append(item)
        for path, items in by_file.items():
            with _opened(path) as file:
                for item in items:
                    read = _cut(
                        file.get_slice(self._stored[item.storage_index].name),
                        item.storage_offsets,
                        item.lengths,
                    )
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(read)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _name(key: str) -> str:
    return key.partition("/")[2]


def _cut(piece: Any, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    ranges = tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))
    return torch.as_tensor(piece[ranges] if ranges else piece[...])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Yield an opened safetensors file; raises RunStopped naming it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as exc:
        raise RunStopped(f"{path}: cannot be read ({exc}); {_REMEDY}") from exc
