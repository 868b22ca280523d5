"""`rollstream model adapt`: coordinate tokens, and their rows, for a stock Qwen vision-language checkpoint.

Weights go from file to file in pieces, so memory does not grow with the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker_schemas.errors import DataError
from broker_schemas.method.coordinates import NUM_BINS, CoordVocabulary, coordinate_token
from broker_schemas.method.model_folder import resolve_model_dir
from broker_schemas.method.prompt import load_tokenizer
from broker_schemas.method.vocabulary_width import (
    VocabularyTensors,
    check_vocabulary_width,
    check_whole_tokens,
    read_model_config,
    vocabulary_tensors,
)
from broker_schemas.method.weight_files import StoredTensor, weight_files
from rollstream.models.coordinate_rows import coordinate_rows
from rollstream.models.growing_shards import Growth, copy_grown, read_rows, row_bytes_of, update_index
from rollstream.models.vocabulary_files import (
    add_tokens,
    first_free_id,
    missing_tokens,
    set_vocabulary_size,
)
from rollstream.staged_folder import MARKER_NAME, check_replaceable, made_by, staged_folder

MAKER: Final = "model adapt"
ROW_MULTIPLE: Final = 64
OTHER_WEIGHTS: Final = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class AdaptSummary:
    """What was done: ``num_new_tokens`` were added and ``num_rows`` are now in embeddings and head."""

    source: Path
    folder: Path
    num_new_tokens: int
    num_rows: int
    is_tied: bool
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.num_new_tokens == 0 and self.folder == self.source:
            return (
                f"nothing to do: {self.source} has its {NUM_BINS} coordinate tokens and "
                f"{self.num_rows:,} rows; use it as it is"
            )
        what = "embeddings, which are the head too" if self.is_tied else "embeddings and head"
        lines = (
            f"{self.folder}: {self.num_new_tokens} coordinate tokens added, {self.num_rows:,} rows in {what}"
        )
        return lines + "".join(f"\nleft out: {name}, weights in another format" for name in self.left_out)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    source: Path
    new_ids: dict[str, int]
    row_of_bin: dict[int, int]
    num_rows: int
    tensors: VocabularyTensors


def adapt_model(
    source: str | Path, destination: str | Path, *, progress: Progress | None = None
) -> AdaptSummary:
    """Write a usable copy of the checkpoint ``source`` (a folder or a cached hub name) to ``destination``.

    A source that needs nothing, or a destination made of it before, is left as it is. ``progress`` hears of
    bytes written and bytes in all. Raises DataError for another family, missing shards, a tokenizer that
    splits coordinate tokens, too little disk, or a destination that holds something else.
    """
    folder, target = resolve_model_dir(source), Path(destination)
    if target.resolve() == folder.resolve() or folder.resolve() in target.resolve().parents:
        raise DataError(f"{target}: got the source or a folder in it, expected a folder beside {folder}")
    plan = _plan(folder)
    if not plan.row_of_bin:
        return _summary(plan, folder)
    if _is_made(plan, target):
        return _summary(_plan(target), target, source=target)
    check_replaceable(target, MAKER)
    _check_disk(plan, target)
    with staged_folder(target, MAKER, {"source": str(folder.resolve())}) as staging:
        left_out = _copy_companions(folder, staging)
        if plan.new_ids:
            add_tokens(staging, plan.new_ids)
        set_vocabulary_size(staging, plan.num_rows)
        _copy_weights(plan, staging, progress or (lambda done, total: None))
        _check_result(staging)
    return _summary(plan, target, left_out=left_out)


def _plan(folder: Path) -> _Plan:
    read_model_config(folder)
    tensors, tokenizer = vocabulary_tensors(folder), load_tokenizer(folder)
    first = first_free_id(tokenizer)
    new_ids = {text: first + place for place, text in enumerate(missing_tokens(tokenizer))}
    ids = [new_ids.get(text, tokenizer.token_to_id(text)) for text in map(coordinate_token, range(NUM_BINS))]
    if not new_ids:
        check_whole_tokens(tokenizer, CoordVocabulary.from_token_to_id(tokenizer.token_to_id), str(folder))
    present = [tensor.shape[0] for tensor in (tensors.embedding, tensors.head) if tensor is not None]
    # tokens whose rows were never made: those of them that fall on padding rows were never begun either
    largest_id = max(tokenizer.token_to_id(text) or 0 for text in map(coordinate_token, range(NUM_BINS)))
    begun = {
        index: int(token_id)
        for index, token_id in enumerate(ids)
        if coordinate_token(index) in new_ids or largest_id >= min(present)
    }
    wanted = max(first + len(new_ids), *present)
    num_rows = -(-wanted // ROW_MULTIPLE) * ROW_MULTIPLE
    return _Plan(source=folder, new_ids=new_ids, row_of_bin=begun, num_rows=num_rows, tensors=tensors)


def _summary(
    plan: _Plan, folder: Path, *, source: Path | None = None, left_out: tuple[str, ...] = ()
) -> AdaptSummary:
    num_rows = plan.num_rows if plan.row_of_bin else plan.tensors.embedding.shape[0]
    return AdaptSummary(
        source=source or plan.source,
        folder=folder,
        num_new_tokens=len(plan.new_ids),
        num_rows=num_rows,
        is_tied=plan.tensors.head is None,
        left_out=left_out,
    )


def _is_made(plan: _Plan, target: Path) -> bool:
    if made_by(target) != MAKER:
        return False
    try:
        made = _plan(target)
    except DataError:
        return False
    return not made.row_of_bin and made.num_rows == plan.num_rows


def _check_disk(plan: _Plan, target: Path) -> None:
    place = target
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    wanted = sum(file.stat().st_size for file in plan.source.iterdir() if file.is_file())
    if free < wanted * 1.02:
        raise DataError(
            f"{target}: got {free / 1e9:.1f} GB free, expected {wanted * 1.02 / 1e9:.1f} GB; "
            "free some, or choose a folder on a larger disk"
        )


def _copy_companions(folder: Path, staging: Path) -> tuple[str, ...]:
    # files in a hub's cache are links: what they name is copied
    left_out = []
    for item in sorted(folder.iterdir()):
        if item.name.startswith(".") or item.suffix == ".safetensors" or item.name == MARKER_NAME:
            continue
        if item.is_dir():
            shutil.copytree(item, staging / item.name)
        elif item.suffix in OTHER_WEIGHTS:
            left_out.append(item.name)
        else:
            shutil.copyfile(item, staging / item.name)
    return tuple(left_out)


def _copy_weights(plan: _Plan, staging: Path, progress: Progress) -> None:
    files = weight_files(plan.source)
    total, done = sum(file.stat().st_size for file in files), 0

    def note(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    tokenizer = load_tokenizer(plan.source)
    grown = [t for t in (plan.tensors.embedding, plan.tensors.head) if t is not None]
    growths = {tensor.name: _growth(plan, tensor, tokenizer) for tensor in grown}
    for file in files:
        copy_grown(file, staging / file.name, growths, note)
    more_rows = [plan.num_rows - tensor.shape[0] for tensor in grown]
    update_index(
        staging,
        sum(more * (t.num_bytes // t.shape[0]) for more, t in zip(more_rows, grown, strict=True)),
        sum(more * t.shape[1] for more, t in zip(more_rows, grown, strict=True)),
    )


def _growth(plan: _Plan, tensor: StoredTensor, tokenizer: Any) -> Growth:
    rows = coordinate_rows(read_rows(tensor, [_digit_id(tokenizer, digit) for digit in range(10)]))
    encoded = row_bytes_of(rows, tensor.dtype)
    by_index = {row: encoded[bin_index] for bin_index, row in plan.row_of_bin.items()}
    return Growth(num_rows=plan.num_rows, rows_by_index=by_index)


def _digit_id(tokenizer: Any, digit: int) -> int:
    ids = tokenizer.encode(str(digit), add_special_tokens=False).ids
    if len(ids) != 1:
        raise DataError(
            f"tokenizer: writes the digit {digit} as {len(ids)} tokens, expected one; "
            "use a Qwen vision-language checkpoint"
        )
    return int(ids[0])


def _check_result(staging: Path) -> None:
    tokenizer = load_tokenizer(staging)
    vocabulary = CoordVocabulary.from_token_to_id(tokenizer.token_to_id)
    check_whole_tokens(tokenizer, vocabulary, str(staging))
    check_vocabulary_width(staging, vocabulary)
