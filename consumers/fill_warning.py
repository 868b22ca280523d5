"""Says that packs leave underfilled: at the first, then at every hundredth, since a log is not a counter."""

from __future__ import annotations

import logging
from typing import Final

from broker_schemas.records.packs import ReadyPack

log = logging.getLogger(__name__)
WARN_EVERY: Final = 100


class FillWarning:
    """Watches the packs of one packer against ``training.packing_min_fill_ratio`` [P-5]."""

    def __init__(self, min_fill_ratio: float) -> None:
        self._min_fill_ratio = min_fill_ratio
        self._num_underfilled = 0

    def is_underfilled(self, pack: ReadyPack, reason: str) -> bool:
        """Say whether a pack that leaves for ``reason`` holds less than the ratio; warn where it is time."""
        if pack.fill >= self._min_fill_ratio:
            return False
        self._num_underfilled += 1
        if self._num_underfilled % WARN_EVERY == 1:
            log.warning(
                "packer: pack %s left at fill %.2f (%s), below training.packing_min_fill_ratio %.2f, the "
                "%d. such pack; ask for more rollouts a step or lower training.global_max_length",
                pack.pack_id,
                pack.fill,
                reason,
                self._min_fill_ratio,
                self._num_underfilled,
            )
        return True
