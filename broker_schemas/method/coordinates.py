"""The coordinate vocabulary: 1000 special tokens, one for each bin, and the arithmetic of bins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from broker_schemas.errors import DataError

NUM_BINS: Final = 1000
LARGEST_BIN: Final = NUM_BINS - 1


def coordinate_token(bin_index: int) -> str:
    """Return the text of the token of ``bin_index`` (0..999)."""
    return f"<|coord_{bin_index}|>"


def bin_from_pixels(pixels: float, extent_pixels: int) -> int:
    """Return the bin of a pixel coordinate along an axis of ``extent_pixels``; clamped to 0..999."""
    normalised = pixels / max(extent_pixels - 1, 1)
    return min(max(round(LARGEST_BIN * normalised), 0), LARGEST_BIN)


def pixels_from_bin(bin_index: float, extent_pixels: int) -> float:
    """Return the pixel coordinate of a bin along an axis of ``extent_pixels``."""
    return bin_index / LARGEST_BIN * (extent_pixels - 1)


@dataclass(frozen=True)
class CoordVocabulary:
    """Token ids of the 1000 coordinate tokens in bin order.

    ``ids`` (1000,) int64; ``bin_by_id`` maps a token id to its bin.
    Raises DataError unless there are exactly 1000 distinct ids [M-11].
    """

    ids: NDArray[np.int64]
    bin_by_id: dict[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        distinct = {int(token_id): bin_index for bin_index, token_id in enumerate(self.ids)}
        if len(self.ids) != NUM_BINS or len(distinct) != NUM_BINS or min(distinct) < 0:
            raise DataError(
                f"coordinate vocabulary: got {len(self.ids)} ids, {len(distinct)} distinct, "
                f"expected exactly {NUM_BINS} distinct ids; add <|coord_0|> to <|coord_999|> to the tokenizer"
            )
        object.__setattr__(self, "bin_by_id", distinct)

    @classmethod
    def from_token_to_id(cls, token_to_id: Callable[[str], int | None]) -> CoordVocabulary:
        """Look the tokens up with ``token_to_id`` (that of ``tokenizers``); raises DataError."""
        found = [token_to_id(coordinate_token(index)) for index in range(NUM_BINS)]
        missing = [coordinate_token(index) for index, token_id in enumerate(found) if token_id is None]
        if missing:
            raise DataError(
                f"coordinate vocabulary: {len(missing)} of {NUM_BINS} tokens are not in the tokenizer, "
                f"first {missing[0]}; add them and their rows: rollstream model adapt SRC DST"
            )
        return cls(np.asarray(found, dtype=np.int64))

    def check_logits_width(self, num_logits: int) -> None:
        """Raise DataError when a coordinate id lies outside logits of ``num_logits`` columns."""
        if int(self.ids.max()) >= num_logits:
            raise DataError(
                f"coordinate vocabulary: got id {int(self.ids.max())}, expected below {num_logits} logits; "
                "resize the model's embeddings: rollstream model adapt SRC DST"
            )
