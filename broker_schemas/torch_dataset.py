"""A pack feed as a torch ``IterableDataset``, for loops that want a ``DataLoader``. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import IterableDataset, get_worker_info

from broker_schemas.client import PackFeed
from broker_schemas.errors import ConfigError
from broker_schemas.records.packs import ReadyPack
from broker_schemas.records.records import MatchedSegment

FeedItem = tuple[ReadyPack, list[MatchedSegment]]


class PackDataset(IterableDataset[FeedItem]):
    """Yields (pack, its segments in order) of one rank for ever; raises DeadlinePassed when none come.

    Use it with ``DataLoader(dataset, batch_size=None, num_workers=0)``: a claim belongs to one process, and
    what a loader's workers fetch ahead would be claimed ahead. The feed of a rank knows its step: resume and
    settle there.
    """

    def __init__(self, feed: PackFeed) -> None:
        self._feed = feed

    def __iter__(self) -> Iterator[FeedItem]:
        if get_worker_info() is not None:
            raise ConfigError("PackDataset: got a worker process of a DataLoader, expected num_workers=0")
        return iter(self._feed)
