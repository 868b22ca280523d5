"""What `rollstream data import` says last: lengths in a model's tokens, settings that suit, what is next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from broker_schemas.method.model_folder import resolve_model_dir
from rollstream.datasets.measuring import measure_files


def after_import(folder: Path, splits: Sequence[str], model: Path | None) -> Iterator[str]:
    """Yield the lines for a terminal; without a model folder only what to do next.

    Raises DataError for a model folder that lacks a file or the coordinate tokens.
    """
    if model is not None:
        measure = measure_files([folder / f"{split}.jsonl" for split in splits], resolve_model_dir(model))
        longest = measure.longest
        yield f"longest sample: {longest.total} tokens, {longest.prompt} of prompt ({longest.sample_id})"
        yield f"model.image.max_pixels that suits: {measure.max_pixels}"
        yield f"max_new_tokens that suits: {measure.max_new_tokens}"
        yield f"training.global_max_length that suits: {measure.global_max_length}"
        if measure.too_wide:
            yield f"shapes that no processor takes: {', '.join(measure.too_wide)}"
    if "val" not in splits:
        yield "no validation split: import again with --resplit to evaluate on images that are not trained"
    model_words = f"--model {model}" if model is not None else "--model MODEL"
    yield f"next: rollstream new NAME --data {folder} {model_words}"
