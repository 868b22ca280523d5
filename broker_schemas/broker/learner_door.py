"""What the learner asks of the broker: claims, payloads, commits, settlements, publications."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.evaluation_rounds import (
    read_numbers,
)
from broker_schemas.broker.payloads import fetch_segments, read_coming_packs, read_filled_packs
from broker_schemas.broker.policy import publish_policy
from broker_schemas.broker.status import read_status
from broker_schemas.errors import RunStopped
from broker_schemas.records import codec
from broker_schemas.records.evaluation_state import EvaluationNumbers
from broker_schemas.records.freshness import oldest_allowed
from broker_schemas.records.packs import ClaimReason, ReadyPack, StepClaim, Untrainable
from broker_schemas.records.records import Channel, MatchedSegment
from broker_schemas.records.run_status import RunStatus

log = logging.getLogger(__name__)
SETTLE_BATCH: Final = 64
ClaimMode = Literal["fallback", "wait", "sealed"]


@dataclass(frozen=True, kw_only=True)
class ClaimSettings:
    """How steps are claimed.

    ``mode``: fallback (a short queue makes the step A), wait (ask again), sealed (the packs that the packer
    completed for this very step, any number a rank). ``packs_per_rank`` = GA.
    ``processor_fingerprint`` is told with every policy, so that rollouts made with another are refused early.
    ``num_rollouts`` > 0 opens the step for that many rollouts before it is claimed (on-policy variants).
    """

    world_size: int
    packs_per_rank: int = 1
    version_window: int
    mode: ClaimMode
    num_rollouts: int = 0
    archived_only: bool = False
    processor_fingerprint: str = ""


class LearnerDoor:
    """The learner's side of the broker; one for each rank. All methods raise BrokerError."""

    def __init__(self, broker: Broker, settings: ClaimSettings) -> None:
        self._broker = broker
        self._settings = settings
        self._opened = -1
        self._claimed = -1

    def claim_step(
        self, *, optimizer_step: int, scheduled_kind: Channel, policy_version: int
    ) -> StepClaim | None:
        """Return the decision for a step, None where it cannot be taken yet; a decision never changes [Q-8].

        Raises RunStopped for a step that a checkpoint has covered already, and when the broker has lost the
        claim that this door was given last.
        """
        settings = self._settings
        if settings.num_rollouts and scheduled_kind == "B" and self._opened < optimizer_step:
            self._broker.run(
                "open_step", ["open_step", "matched"], [optimizer_step, policy_version, settings.num_rollouts]
            )
            self._opened = optimizer_step
        reply = self._broker.run(
            "claim_step",
            ["claims", f"claim:{optimizer_step}", "sealed"],
            [
                optimizer_step,
                scheduled_kind,
                settings.world_size,
                settings.packs_per_rank,
                oldest_allowed(policy_version, settings.version_window),
                policy_version,
                settings.mode,
                self._claimed,
            ],
        )
        if not reply:
            return None
        if reply == [b"lost"]:
            raise _claim_lost(self._claimed)
        if reply == [b"settled"]:
            raise RunStopped(
                f"optimizer step {optimizer_step}: a checkpoint covers it; resume from the latest one"
            )
        self._claimed = optimizer_step
        return claim_from_fields(optimizer_step, settings.world_size, reply)

    def filled_packs(self, optimizer_step: int) -> list[tuple[ReadyPack, ...]]:
        """Return, for each rank, the packs of the step that are ready already, in the order of its claim."""
        return read_filled_packs(self._broker, optimizer_step, range(self._settings.world_size))

    def fetch_segments(self, record_ids: Sequence[str]) -> list[MatchedSegment]:
        """Return the payloads in the order asked."""
        return fetch_segments(self._broker, record_ids)

    def fetch_coming(
        self, rank: int, *, optimizer_step: int, policy_version: int, num_taken: int = 0
    ) -> list[tuple[ReadyPack, list[MatchedSegment]]]:
        """Return the packs, with their segments, that the claim of a coming step would give ``rank`` now.

        Nothing is moved and nothing promised: the claim may name others. ``num_taken`` packs, the first of
        the step, are left out. Raises RecordError too.
        """
        settings = self._settings
        if settings.mode == "sealed":
            packs = list(read_filled_packs(self._broker, optimizer_step, (rank,))[0])
        else:
            oldest = oldest_allowed(policy_version, settings.version_window)
            packs = read_coming_packs(
                self._broker, rank, oldest_policy_version=oldest, at_most=settings.packs_per_rank
            )
        wanted = packs[num_taken:]
        segments = iter(self.fetch_segments([name for pack in wanted for name in pack.record_ids]))
        return [(pack, [next(segments) for _ in pack.record_ids]) for pack in wanted]

    def quarantine(self, *, optimizer_step: int, segments: Sequence[Untrainable]) -> None:
        """Take segments out of the claim of a step that no checkpoint covers; said twice, the first stays.

        Raises RunStopped for a segment that is not in this claim.
        """
        arguments = [text for item in segments for text in (item.record_id, item.reason, item.detail)]
        reply = self._broker.run(
            "quarantine",
            [f"claim:{optimizer_step}", "rejected"],
            [optimizer_step, len(segments), *arguments],
        )
        unknown = [
            item.record_id
            for item, status in zip(segments, reply.split(), strict=True)
            if status == b"unknown"
        ]
        if unknown:
            raise RunStopped(
                f"optimizer step {optimizer_step}: its claim does not hold {', '.join(unknown)}, or a "
                "checkpoint covers it already, so there is nothing to take out"
            )
        for item in segments:
            log.warning(
                "optimizer step %d: rollout %s is taken out of it (%s): %s",
                *(optimizer_step, item.record_id, item.reason, item.detail),
            )

    def commit_step(self, *, optimizer_step: int, summary: Mapping[str, float | int | str]) -> None:
        """Record that the step was taken; said twice, the first stays.

        Raises RunStopped when the broker has lost the claim that it gave to this door.
        """
        reply = self._broker.run(
            "commit_step", [f"claim:{optimizer_step}"], [optimizer_step, codec.encode_map(summary)]
        )
        if reply == -1 and self._claimed == optimizer_step:
            raise _claim_lost(optimizer_step)

    def settle_checkpoint(self, *, optimizer_step: int) -> None:
        """Free all steps below ``optimizer_step``, as far as the archive has come."""
        archived_only = int(self._settings.archived_only)
        while True:
            freed, left = self._broker.run(
                "settle_checkpoint", ["claims", "archive"], [optimizer_step, archived_only, SETTLE_BATCH]
            )
            if not freed or not left:
                return

    def publish_policy(self, *, policy_version: int, optimizer_step: int, weights_path: str) -> None:
        """Make a policy version current."""
        publish_policy(
            self._broker,
            policy_version=policy_version,
            optimizer_step=optimizer_step,
            weights_path=weights_path,
            processor_fingerprint=self._settings.processor_fingerprint,
        )

    def evaluations(self, *, beyond_step: int) -> list[EvaluationNumbers]:
        """Return the numbers of rounds of evaluation beyond an optimizer step, oldest first."""
        return read_numbers(self._broker, beyond_step=beyond_step)

    def queue_status(self) -> RunStatus:
        """Return depth, waiting records and the running sums of the log."""
        return read_status(self._broker, self._settings.world_size)

    def close(self) -> None:
        self._broker.close()


def claim_from_fields(optimizer_step: int, world_size: int, flat: Sequence[bytes]) -> StepClaim:
    """Return the claim held by the fields of ``claim:<step>``, names and values in turn."""
    fields = dict(zip(flat[0::2], flat[1::2], strict=True))
    packs: list[tuple[ReadyPack, ...]] = []
    for rank in range(world_size):
        mine: list[ReadyPack] = []
        while (raw := fields.get(f"p:{rank}:{len(mine)}".encode())) is not None:
            mine.append(ReadyPack.from_body(codec.decode_map(raw)))
        packs.append(tuple(mine))
    kind = cast(Channel, fields[b"kind"].decode())
    out = {name.decode().removeprefix("out:") for name in fields if name.startswith(b"out:")}
    claim = StepClaim(
        optimizer_step=optimizer_step,
        kind=kind,
        reason=cast(ClaimReason, fields[b"reason"].decode()),
        policy_version=int(fields[b"policy_version"]),
        packs=tuple(packs) if kind == "B" else (),
        short_ranks=tuple(int(rank) for rank in fields[b"short"].split()),
    )
    return claim.without(out) if out else claim


def _claim_lost(optimizer_step: int) -> RunStopped:
    """Return why a learner must not go on: its last rollouts would be claimed, and trained, again."""
    return RunStopped(
        f"optimizer step {optimizer_step}: the broker no longer knows its claim, so it crashed and lost what "
        "it had acknowledged; start again: the run goes on from its last checkpoint. With broker.durability "
        "'always' (on a server of your own: appendfsync always) nothing acknowledged is lost"
    )
