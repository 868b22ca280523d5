"""The library doors: push rollouts from any sampler, iterate packs in any training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, cast

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.learner_door import ClaimSettings, LearnerDoor
from broker_schemas.broker.payloads import fetch_segments
from broker_schemas.broker.policy import read_policy
from broker_schemas.errors import BrokerFull, BrokerUnavailable, DeadlinePassed
from broker_schemas.records.codec import MAX_RECORD_BYTES
from broker_schemas.records.packs import ReadyPack
from broker_schemas.records.records import MatchedSegment, SegmentRecord

_LINE_BREAKERS: Final = str.maketrans("\t\n", "  ")
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
        if not records:
            return []
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
        reply = self._broker.run(
            "push_segments",
            ["segments", "seen:now", "seen:before"],
            arguments,
            bodies=list(bodies.items()),
        )
        if isinstance(reply, list):
            raise BrokerFull(
                f"pushing {len(records)} rollouts: got {reply[1]} bytes in use of {settings.max_bytes}, "
                "expected room; wait for the learner, or raise broker.max_bytes"
            )
        statuses = reply.decode().split()
        if "no_body" in statuses:
            raise BrokerUnavailable(
                f"pushing {len(records)} rollouts: {statuses.count('no_body')} bodies were gone before they "
                "were admitted; push again, what was admitted is a duplicate then"
            )
        return cast("list[PushStatus]", statuses)

    def push_when_room(self, records: Sequence[SegmentRecord], *, deadline_s: float) -> list[PushStatus]:
        """Push as soon as the byte budget allows; raises DeadlinePassed after ``deadline_s``."""
        give_up_at = time.monotonic() + deadline_s
        pause_s = 0.05
        while True:
            try:
                return self.push(records)
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
    """Iterates packs of one rank in any training loop: claims, yields, and settles on request.

    Each item is (pack, its segments in order). ``packs_per_step`` packs make one optimizer step;
    ``settle(optimizer_steps)`` says that a checkpoint covers them.
    """

    broker: Broker
    packs_per_step: int = 1
    world_size: int = 1
    rank: int = 0
    first_optimizer_step: int = 0
    version_window: int = 2
    deadline_s: float = 60.0
    poll_s: float = 0.05
    optimizer_step: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.optimizer_step = self.first_optimizer_step

    def __iter__(self) -> Iterator[tuple[ReadyPack, list[MatchedSegment]]]:
        while True:
            yield from self.next_step()

    def next_step(self) -> list[tuple[ReadyPack, list[MatchedSegment]]]:
        """Return this rank's packs of the next optimizer step; raises DeadlinePassed."""
        policy = read_policy(self.broker)
        door = LearnerDoor(
            self.broker,
            ClaimSettings(
                world_size=self.world_size,
                packs_per_rank=self.packs_per_step,
                version_window=self.version_window,
                mode="wait",
            ),
        )
        give_up_at = time.monotonic() + self.deadline_s
        while True:
            claim = door.claim_step(
                optimizer_step=self.optimizer_step,
                scheduled_kind="B",
                policy_version=policy.policy_version if policy else 0,
            )
            if claim is not None:
                break
            if time.monotonic() > give_up_at:
                raise DeadlinePassed(
                    f"optimizer step {self.optimizer_step}: no packs in {self.deadline_s:g} s"
                )
            time.sleep(self.poll_s)
        self.optimizer_step += 1
        return [(pack, fetch_segments(self.broker, pack.record_ids)) for pack in claim.packs[self.rank]]

    def settle(self, optimizer_steps: int) -> None:
        """Free the packs of the first ``optimizer_steps`` steps: a checkpoint covers them."""
        LearnerDoor(self.broker, ClaimSettings(world_size=self.world_size)).settle_checkpoint(
            optimizer_step=optimizer_steps
        )
