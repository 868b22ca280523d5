"""The packed rows of one rank and step, loaded by a thread while the row before is computed.

While the last row of a step is computed the thread gets the next step: its ground truth, or what a claim
would give it now, so that the claim itself has nothing left to fetch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from broker_schemas.errors import BrokerError, DataError, RecordError
from broker_schemas.records.packs import ReadyPack, StepClaim, Untrainable
from broker_schemas.records.records import MatchedSegment
from learner.collation import CollationSettings, PackedRow, PositionRule, collate_row
from learner.dataset_positions import plan_rows, share_of_rank
from learner.ports import FetchedPack, GroundTruthSource, LearnerBroker, PixelSource
from learner.quarantine import load_trainable


@dataclass(frozen=True, kw_only=True)
class LoadedRow:
    """A row and what is reported about it: ``fill`` of its capacity, ``counters`` of M-12 summed over its
    segments, ``lags`` in policy versions when claimed, one for each rollout segment. There is no row where
    it has ``broken`` segments.
    """

    row: PackedRow | None
    fill: float = 0.0
    counters: Counter[str] = field(default_factory=Counter)
    lags: tuple[int, ...] = ()
    broken: tuple[Untrainable, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RowSources:
    """Where rows come from. ``ground_truth`` may be None where no A
    step can be, ``pixels`` where no B step can.
    """

    broker: LearnerBroker
    ground_truth: GroundTruthSource | None
    pixels: PixelSource | None
    collation: CollationSettings
    positions_of: PositionRule


@dataclass(frozen=True, kw_only=True)
class PacksAhead:
    """Packs that a claim may name, with their segments, and the row of the first, if there is one."""

    fetched: tuple[FetchedPack, ...] = ()
    first: LoadedRow | None = None

    def segments_of(self, pack: ReadyPack) -> list[MatchedSegment] | None:
        """Return what was fetched of exactly this pack."""
        return next((segments for ahead, segments in self.fetched if ahead == pack), None)

    def row_of(self, pack: ReadyPack, policy_version: int) -> LoadedRow | None:
        """Return the row that was built of exactly this pack, for a claim at this version."""
        is_first = bool(self.fetched) and self.fetched[0][0] == pack
        if not is_first or self.first is None or self.first.row is None:
            return None  # what could not be loaded then is judged now
        return replace(self.first, lags=_lags(self.fetched[0][1], policy_version))


class RowLoader:
    """Builds the rows of one rank; one worker thread, one row ahead, over the end of a step too."""

    def __init__(
        self,
        sources: RowSources,
        *,
        rank: int,
        world_size: int,
        row_capacity_tokens: int,
        gradient_accumulation_steps: int,
    ) -> None:
        self._sources = sources
        self._rank = rank
        self._world_size = world_size
        self._capacity_tokens = row_capacity_tokens
        self._num_micro_steps = gradient_accumulation_steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="row-loader")
        self._ahead: tuple[int, Future[list[LoadedRow]]] | None = None
        self._packs_ahead: Future[PacksAhead] | None = None

    def num_segments_in_step(self, claim: StepClaim) -> int:
        """Return the denominator of the step's loss: its segments over all ranks."""
        return claim.num_segments if claim.kind == "B" else self._ground_truth(claim).num_segments

    def rows_of(
        self, claim: StepClaim, *, num_taken: int = 0, then: Callable[[], None] = lambda: None
    ) -> Iterator[LoadedRow]:
        """Yield this rank's rows of the step in micro-step order, but for the first ``num_taken``.

        ``then`` is called when the thread has done the last of them: before that one is yielded.
        """
        if claim.kind == "B":
            packs = claim.packs[self._rank][num_taken:]
            yield from self.rows_of_packs(packs, claim.optimizer_step, claim.policy_version, then=then)
            return
        optimizer_step = claim.optimizer_step
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != optimizer_step:
            rows = self._ground_truth_rows(optimizer_step, claim.policy_version)
        else:
            rows = ahead[1].result()
        yield from rows[:-1]
        then()
        yield from rows[-1:]

    def load_ahead(self, optimizer_step: int, policy_version: int) -> None:
        """Start building the A rows of a coming step; what is not asked for afterwards is let go."""
        if self._ahead is not None and self._ahead[0] == optimizer_step:
            return
        self._ahead = (
            optimizer_step,
            self._thread.submit(self._ground_truth_rows, optimizer_step, policy_version),
        )

    def fetch_ahead(self, optimizer_step: int, policy_version: int, *, num_taken: int = 0) -> None:
        """Start fetching what the claim of a step would give now, but for its first packs.

        A claim that names other packs fetches them itself; what it does not name is let go.
        """
        self._packs_ahead = self._thread.submit(self._fetch, optimizer_step, policy_version, num_taken)

    def _fetch(self, optimizer_step: int, policy_version: int, num_taken: int) -> PacksAhead:
        """Return nothing where anything is wrong: what is claimed is fetched again, and judged there."""
        try:
            fetched = tuple(
                self._sources.broker.fetch_coming(
                    self._rank,
                    optimizer_step=optimizer_step,
                    policy_version=policy_version,
                    num_taken=num_taken,
                )
            )
            first = self._rollout_row(*fetched[0], policy_version) if fetched else None
        except (BrokerError, RecordError, DataError):
            return PacksAhead()
        return PacksAhead(fetched=fetched, first=first)

    def close(self) -> None:
        """Stop the thread after the row it works on."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def rows_of_packs(
        self,
        packs: Sequence[ReadyPack],
        optimizer_step: int,
        policy_version: int,
        *,
        then: Callable[[], None] = lambda: None,
    ) -> Iterator[LoadedRow]:
        """Yield the rows of packs of a step, in their order; none for a pack that all segments left.

        ``then`` as in ``rows_of``.
        """
        pending, self._packs_ahead = self._packs_ahead, None
        packs = [pack for pack in packs if pack.record_ids]
        if not packs:
            then()
            return
        ahead = PacksAhead() if pending is None else pending.result()
        grouped = self._segments_of(packs, ahead, optimizer_step)
        loaded = ahead.row_of(packs[0], policy_version)
        if loaded is None:
            loaded = self._thread.submit(self._rollout_row, packs[0], grouped[0], policy_version).result()
        for pack, members in zip(packs[1:], grouped[1:], strict=True):
            coming = self._thread.submit(self._rollout_row, pack, members, policy_version)
            yield loaded
            loaded = coming.result()
        then()
        yield loaded

    def _segments_of(
        self, packs: Sequence[ReadyPack], ahead: PacksAhead, optimizer_step: int
    ) -> list[list[MatchedSegment]]:
        """Return the segments of each pack: those that are here already, and the others in one request."""
        here = [ahead.segments_of(pack) for pack in packs]
        names = [
            name
            for pack, segments in zip(packs, here, strict=True)
            if segments is None
            for name in pack.record_ids
        ]
        fetched = self._sources.broker.fetch_segments(names) if names else []
        if [segment.record_id for segment in fetched] != names:
            raise DataError(
                f"optimizer step {optimizer_step}: got segments "
                f"{[segment.record_id for segment in fetched]}, expected {names} in this order"
            )
        remaining = iter(fetched)
        return [
            [next(remaining) for _ in pack.record_ids] if segments is None else segments
            for pack, segments in zip(packs, here, strict=True)
        ]

    def _rollout_row(
        self, pack: ReadyPack, segments: Sequence[MatchedSegment], policy_version: int
    ) -> LoadedRow:
        foreign = [segment.record_id for segment in segments if segment.channel != "B"]
        lengths = [segment.encoded_length for segment in segments]
        if foreign or lengths != list(pack.lengths):
            raise DataError(
                f"pack {pack.pack_id}: got segment lengths {lengths} and segments {foreign} that are not "
                f"of channel B, expected lengths {list(pack.lengths)} and channel B only"
            )
        source = self._sources.pixels
        if source is None:
            raise DataError(f"pack {pack.pack_id}: got a rollout in a run without a pixel source")
        pixels, broken = load_trainable(segments, source, self._sources.collation)
        if broken:
            return LoadedRow(row=None, broken=tuple(broken))
        counters: Counter[str] = Counter()
        for segment in segments:
            counters.update(segment.counters)
        return LoadedRow(
            row=collate_row(segments, pixels, self._sources.collation, self._sources.positions_of),
            fill=pack.fill,
            counters=counters,
            lags=_lags(segments, policy_version),
        )

    def _ground_truth(self, claim: StepClaim) -> GroundTruthSource:
        if self._sources.ground_truth is None:
            raise DataError(
                f"optimizer step {claim.optimizer_step}: got an A step in a run without ground truth"
            )
        return self._sources.ground_truth

    def _ground_truth_rows(self, optimizer_step: int, policy_version: int) -> list[LoadedRow]:
        source = self._sources.ground_truth
        if source is None:
            raise DataError(f"optimizer step {optimizer_step}: got an A step in a run without ground truth")
        places = share_of_rank(source.num_segments, self._rank, self._world_size)
        items = source.load_items(optimizer_step, places, policy_version)
        lengths = [segment.encoded_length for segment, _ in items]
        self._check_lengths([segment for segment, _ in items])
        plan = plan_rows(
            lengths, capacity_tokens=self._capacity_tokens, num_micro_steps=self._num_micro_steps
        )
        rows = []
        for indices in plan:
            row = collate_row(
                [items[index][0] for index in indices],
                [items[index][1] for index in indices],
                self._sources.collation,
                self._sources.positions_of,
            )
            fill = row.num_tokens / self._capacity_tokens
            rows.append(LoadedRow(row=row, fill=fill, counters=Counter(), lags=()))
        return rows

    def _check_lengths(self, segments: Sequence[MatchedSegment]) -> None:
        for segment in segments:
            if segment.encoded_length > self._capacity_tokens:
                raise DataError(
                    f"sample {segment.sample_id}: {segment.encoded_length} tokens, expected at most "
                    f"{self._capacity_tokens} (training.global_max_length); raise it, lower "
                    "model.image.max_pixels or take the sample out"
                )


def _lags(segments: Sequence[MatchedSegment], policy_version: int) -> tuple[int, ...]:
    return tuple(policy_version - segment.policy_version for segment in segments)
