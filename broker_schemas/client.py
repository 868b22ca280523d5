"""The library doors: push rollouts from any sampler, iterate packs in any training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal, TypeVar, cast

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.fetched_ahead import FetchedAhead
from broker_schemas.broker.learner_door import ClaimSettings, LearnerDoor
from broker_schemas.broker.payloads import fetch_segments
from broker_schemas.broker.policy import read_policy
from broker_schemas.errors import BrokerFull, BrokerUnavailable, ConfigError, DeadlinePassed, RunStopped
from broker_schemas.records.codec import MAX_RECORD_BYTES
from broker_schemas.records.packs import ReadyPack
from broker_schemas.records.records import MatchedSegment, SegmentRecord

_LINE_BREAKERS: Final = str.maketrans("\t\n", "  ")
Answer = TypeVar("Answer")
PushStatus = Literal["ok", "duplicate", "late", "too_large", "bad_id"]


@dataclass(frozen=True, kw_only=True)
class SinkSettings:
    """``max_bytes`` is the byte budget of the run, ``dedup_window`` how many ids are surely recognised."""

    max_bytes: int = 1 << 30
    dedup_window: int = 16_384
    max_record_bytes: int = MAX_RECORD_BYTES


class SegmentSink:
    """Pushes rollouts, each effective once; waits while the broker is full [Q-4, Q-12]."""

    def __init__(self, broker: Broker, settings: SinkSettings | None = None) -> None:
        self._broker = broker
        self._settings = settings or SinkSettings()

    def push(self, records: Sequence[SegmentRecord]) -> list[PushStatus]:
        """Push ``records`` in one transition and return a status for each, in order.

        Raises BrokerFull, with nothing pushed, when they do not fit the byte budget; BrokerUnavailable when
        the broker let go of a body before it was admitted: push again.
        """
        return self._encoded(records)() if records else []

    def push_when_room(self, records: Sequence[SegmentRecord], *, deadline_s: float) -> list[PushStatus]:
        """Push as soon as the byte budget allows; raises DeadlinePassed after ``deadline_s``."""
        return _when_room(self._encoded(records), deadline_s) if records else []

    def push_batches(
        self, batches: Iterable[Sequence[SegmentRecord]], *, deadline_s: float
    ) -> Iterator[list[PushStatus]]:
        """Push batches in their order, the next encoded while the last is under way; yield their statuses.

        Each is a transition of its own and waits for room as ``push_when_room`` does. What was pushed before
        an error stays, and is a duplicate when it is pushed again.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="push") as hand:
            under_way = None
            for batch in batches:
                send = self._encoded(batch) if batch else list
                if under_way is not None:
                    yield under_way.result()
                under_way = hand.submit(_when_room, send, deadline_s)
            if under_way is not None:
                yield under_way.result()

    def _encoded(self, records: Sequence[SegmentRecord]) -> Callable[[], list[PushStatus]]:
        """Return what sends ``records``, as often as it is called."""
        settings = self._settings
        arguments: list[str | int | bytes] = [
            settings.max_bytes,
            settings.dedup_window,
            settings.max_record_bytes,
            len(records),
        ]
        bodies: dict[str, bytes] = {}
        for record in records:  # of one id, the first counts: its body must not be replaced by a later one
            key = self._broker.keys.raw(record.record_id)
            if key not in bodies:
                bodies[key] = record.encode_body()
        arguments += [segment_line(record) for record in records]
        return partial(self._send, arguments, list(bodies.items()), len(records))

    def _send(
        self, arguments: Sequence[str | int | bytes], bodies: Sequence[tuple[str, bytes]], num: int
    ) -> list[PushStatus]:
        named_keys = ["segments", "seen:now", "seen:before"]
        reply = self._broker.run("push_segments", named_keys, arguments, bodies=bodies)
        if isinstance(reply, list):
            raise BrokerFull(
                f"pushing {num} rollouts: got {reply[1]} bytes in use of {self._settings.max_bytes}, "
                "expected room; wait for the learner, or raise broker.max_bytes"
            )
        statuses = reply.decode().split()
        if "no_body" in statuses:
            raise BrokerUnavailable(
                f"pushing {num} rollouts: {statuses.count('no_body')} bodies were gone before they "
                "were admitted; push again, what was admitted is a duplicate then"
            )
        return cast("list[PushStatus]", statuses)


def _when_room(send: Callable[[], list[PushStatus]], deadline_s: float) -> list[PushStatus]:
    give_up_at = time.monotonic() + deadline_s
    pause_s = 0.05
    while True:
        try:
            return send()
        except BrokerFull as exc:
            if time.monotonic() + pause_s > give_up_at:
                raise DeadlinePassed(f"broker full for {deadline_s:g} s: {exc}") from exc
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)


def segment_line(record: SegmentRecord) -> str:
    """Return the line by which the log describes a rollout: see ``push_segments.lua``."""
    num_tokens = len(record.prompt_token_ids) + len(record.response_token_ids)
    task, sample_id = record.task.translate(_LINE_BREAKERS), record.sample_id.translate(_LINE_BREAKERS)
    return (
        f"{record.record_id}\t{record.policy_version}\t{record.request_id}\t{num_tokens}\t{task}\t{sample_id}"
        f"\t{record.generated_at_ms}\t{record.purpose}\t{record.optimizer_step}"
    )


@dataclass
class PackFeed:
    """Packs of one rank for a trainer of one's own; a step is decided once, for all ranks, for ever.

    An optimizer step is ``packs_per_step`` packs a rank; each is waited for ``deadline_s``, also where the
    broker is away. A feed gives rollout steps (channel B) alone: ground-truth steps (channel A) need no
    queue, so take them from your own data and call nothing here. While you train a step, the packs that are
    ready for the next one are fetched.

    Resume with ``first_optimizer_step``, the number of steps that your checkpoint covers: packs of steps that
    no checkpoint covers are given again, the same in the same order. ``archived_only`` where an archive runs:
    what it has not kept yet is not freed.
    """

    broker: Broker
    packs_per_step: int = 1
    world_size: int = 1
    rank: int = 0
    first_optimizer_step: int = 0
    version_window: int = 2
    deadline_s: float = 60.0
    poll_s: float = 0.05
    archived_only: bool = False
    optimizer_step: int = field(init=False, default=0)
    _door: LearnerDoor = field(init=False, repr=False)
    _ahead: FetchedAhead = field(init=False, repr=False, default_factory=FetchedAhead)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"pack feed: got rank {self.rank}, expected 0 to {self.world_size - 1}")
        self.optimizer_step = self.first_optimizer_step
        # one door for all steps: it knows the claim it was given last, and so whether the broker lost it
        self._door = LearnerDoor(
            self.broker,
            ClaimSettings(
                world_size=self.world_size,
                packs_per_rank=self.packs_per_step,
                version_window=self.version_window,
                mode="wait",
                archived_only=self.archived_only,
            ),
        )

    def __iter__(self) -> Iterator[tuple[ReadyPack, list[MatchedSegment]]]:
        while True:
            yield from self.next_step()

    def next_step(self) -> list[tuple[ReadyPack, list[MatchedSegment]]]:
        """Return this rank's packs of the next optimizer step, each with its segments in order.

        Raises DeadlinePassed, naming the step and what it waited for, and can be called again then. Raises
        RunStopped where the broker lost the claim of the step before, for its rollouts would come again:
        go back to your last checkpoint and make a new feed; and for a step that a checkpoint covers.
        """
        give_up_at = time.monotonic() + self.deadline_s
        packs = self._patiently(self._claim, give_up_at)
        known = self._ahead.take()
        wanted = [name for pack in packs for name in pack.record_ids if name not in known]
        fetched = self._patiently(lambda: fetch_segments(self.broker, wanted), give_up_at)
        known |= {segment.record_id: segment for segment in fetched}
        self.optimizer_step += 1
        self._ahead.start(self._fetch_coming)
        return [(pack, [known[name] for name in pack.record_ids]) for pack in packs]

    def commit(self, summary: Mapping[str, float | int | str] | None = None) -> None:
        """Record that the step given last was taken, with numbers for the log; said again it changes nothing.

        One rank says it; left out, the checkpoint that covers the step says it. Raises as ``next_step``.
        """
        step = self.optimizer_step - 1
        self._patiently(
            lambda: self._door.commit_step(optimizer_step=step, summary=summary or {}),
            time.monotonic() + self.deadline_s,
        )

    def settle(self, optimizer_steps: int) -> None:
        """Free the packs of the first ``optimizer_steps`` steps: a checkpoint that is on disk covers them.

        One rank says it, after the checkpoint of every rank is written; said again it changes nothing.
        """
        self._patiently(
            lambda: self._door.settle_checkpoint(optimizer_step=optimizer_steps),
            time.monotonic() + self.deadline_s,
        )

    def state_dict(self) -> dict[str, int]:
        """Return what a checkpoint keeps of this feed."""
        return {"optimizer_step": self.optimizer_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where a checkpoint was written; before the first step of this feed."""
        self.optimizer_step = int(state["optimizer_step"])

    def _fetch_coming(self) -> list[MatchedSegment]:
        policy = read_policy(self.broker)
        coming = self._door.fetch_coming(
            self.rank,
            optimizer_step=self.optimizer_step,
            policy_version=policy.policy_version if policy else 0,
        )
        return [segment for _, segments in coming for segment in segments]

    def _claim(self) -> tuple[ReadyPack, ...] | None:
        policy = read_policy(self.broker)
        claim = self._door.claim_step(
            optimizer_step=self.optimizer_step,
            scheduled_kind="B",
            policy_version=policy.policy_version if policy else 0,
        )
        if claim is None:
            return None
        if claim.kind != "B" or any(not packs for packs in claim.packs):
            raise RunStopped(
                f"optimizer step {self.optimizer_step}: was decided as {claim.kind} without packs for all of "
                f"{self.world_size} ranks; go on with the trainer and the ranks that began the run"
            )
        return claim.packs[self.rank]

    def _patiently(self, ask: Callable[[], Answer | None], give_up_at: float) -> Answer:
        waited_for = "packs: are producers, matchers and the packer running?"
        while True:
            try:
                answer = ask()
                if answer is not None or ask != self._claim:
                    return cast(Answer, answer)
            except (BrokerUnavailable, BrokerFull) as exc:
                waited_for = f"the broker: {exc}"
            if time.monotonic() >= give_up_at:
                raise DeadlinePassed(
                    f"optimizer step {self.optimizer_step}: waited {self.deadline_s:g} s for {waited_for}"
                )
            time.sleep(self.poll_s)
