"""Starting rows for coordinate tokens, from the rows of the digits that write their numbers.

The tokenizers of Qwen write 427 as 4, 2, 7. Taken as they stand these digits would put 399 far from 400, so
hundreds and tens glide from one digit to the next, and the last digit is how far the tens have come:
neighbouring bins are neighbours, and bins of one hundred lie nearer to each other than to other hundreds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

from broker_schemas.method.coordinates import LARGEST_BIN, NUM_BINS

PLACE_WEIGHTS: Final = (1.0, 0.5)


def coordinate_rows(digit_rows: torch.Tensor) -> torch.Tensor:
    """Return (1000, width) float32 rows for the bins from ``digit_rows`` (10, width) of 0 to 9.

    Their distance from the digits' mean is that of the digits themselves, on average.
    """
    import torch

    digits = digit_rows.float()
    centre = digits.mean(dim=0)
    spokes = digits - centre
    bins = torch.arange(NUM_BINS, dtype=torch.float32)
    hundreds, tens = PLACE_WEIGHTS
    rows = hundreds * _glide(spokes, bins / LARGEST_BIN * 9)
    rows += tens * _glide(spokes, bins / 10)
    # one scale for all: rows made equally long one by one would jump where a digit is reached
    scale = spokes.norm(dim=1).mean() / rows.norm(dim=1).mean().clamp_min(1e-12)
    return torch.as_tensor(centre + rows * scale)


def _glide(spokes: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    # after 9 comes 0 again: without it bin 99 and bin 100 would be strangers
    lower = places.floor()
    share = (places - lower)[:, None]
    return (1 - share) * spokes[lower.long() % 10] + share * spokes[(lower.long() + 1) % 10]
