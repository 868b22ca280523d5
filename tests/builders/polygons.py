"""What tests say of polygons."""

from __future__ import annotations

from collections.abc import Sequence

from broker_schemas.method.polygon import canonical_polygon


def is_canonical(bins: Sequence[int]) -> bool:
    """Return whether ``bins`` is its own canonical spelling; False for what is no polygon at all."""
    try:
        return canonical_polygon(bins) == tuple(bins)
    except ValueError:
        return False
