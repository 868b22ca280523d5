"""Starting values for embeddings of places: neighbours begin alike.

With independent random rows every bin and every patch position would have to be learned by itself, and patch
positions at the usual scale drown in the patch contents: tried on scenes, localisation then starts only after
about a thousand steps. Rows made of waves along the axis share what they learn with their neighbours.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

COORDINATE_CYCLES: Final = (0.5, 60.0)
POSITION_CYCLES: Final = (0.25, 4.0)
POSITION_SCALE: Final = 0.3


def coordinate_waves(num_bins: int, width: int, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Return (num_bins, width) float32 rows of standard deviation near ``scale``: a wave a column.

    Frequencies are drawn log-uniformly from COORDINATE_CYCLES over the axis, phases uniformly.
    """
    import torch

    places = torch.arange(num_bins) / num_bins
    return scale * _waves(places[:, None].expand(num_bins, width), COORDINATE_CYCLES, generator)


def position_waves(grid_side: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Return (grid_side squared, width) float32 rows for a square grid of patches, row by row.

    Even columns wave across the image, odd ones down it; standard deviation near POSITION_SCALE.
    """
    import torch

    along = torch.arange(grid_side) / grid_side
    is_across = torch.arange(width) % 2 == 0
    places = torch.where(is_across, along[None, :, None], along[:, None, None])
    return POSITION_SCALE * _waves(places.reshape(grid_side**2, width), POSITION_CYCLES, generator)


def _waves(places: torch.Tensor, cycles: tuple[float, float], generator: torch.Generator) -> torch.Tensor:
    import torch

    width = places.shape[1]
    lowest, highest = cycles
    frequencies = lowest * torch.exp(torch.rand(width, generator=generator) * math.log(highest / lowest))
    phases = 2 * math.pi * torch.rand(width, generator=generator)
    return math.sqrt(2) * torch.cos(2 * math.pi * places * frequencies + phases)
