"""The matcher's loop: reads rollouts, matches each, commits what became of them in one transition."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from broker_schemas.broker.matcher_door import MatcherDoor, MatchVerdict, RawEntry
from broker_schemas.broker.policy import PublishedPolicy, read_policy
from broker_schemas.broker.role_loop import keep_stepping
from broker_schemas.errors import BodyMissing, MalformedRecord, RecordError
from broker_schemas.records import codec
from broker_schemas.records.freshness import oldest_allowed
from broker_schemas.records.records import SegmentRecord
from consumers.metrics import MatcherMetrics
from consumers.record_matching import MatcherTools, MatchOutcome, ParseFailure, match_record

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MatcherSettings:
    """``version_window`` None: every version is welcome (on-policy variants order their own rollouts)."""

    batch_size: int = 64
    version_window: int | None = 2
    block_ms: int = 500


@dataclass
class FailureDump:
    """Writes rollouts that did not parse well to a JSON Lines file, ``at_most`` of them [M-12]."""

    path: Path
    at_most: int
    _num_written: int = field(default=0, init=False)

    def write(self, failure: ParseFailure) -> None:
        if self._num_written >= self.at_most:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(failure), ensure_ascii=False) + "\n")
        self._num_written += 1


class Matcher:
    """One matcher process; any number of them share the work."""

    def __init__(
        self,
        door: MatcherDoor,
        tools: MatcherTools,
        metrics: MatcherMetrics,
        settings: MatcherSettings,
        dump: FailureDump | None = None,
    ) -> None:
        self._door = door
        self._tools = tools
        self._metrics = metrics
        self._settings = settings
        self._dump = dump

    def loop(self, stop: threading.Event) -> None:
        """Step until ``stop``; a broker that is away is waited for."""
        keep_stepping(
            lambda: self.step(time.monotonic()), stop, role="matcher", on_trouble=self._door.look_again
        )

    def step(self, now_s: float) -> int:
        """Match one batch; return how many rollouts it held. Raises BrokerError."""
        entries = self._read(now_s)
        if not entries:
            return 0
        started_s = time.monotonic()
        policy = read_policy(self._door.broker)
        oldest = self._oldest_policy_version(policy)
        fingerprint = policy.processor_fingerprint if policy else ""
        verdicts = [self._judge(entry, oldest, fingerprint) for entry in entries]
        seconds = time.monotonic() - started_s
        statuses = self._door.commit(verdicts, oldest_policy_version=oldest)
        self._metrics.on_batch(statuses, seconds)
        return len(entries)

    def _read(self, now_s: float) -> list[RawEntry]:
        count = self._settings.batch_size
        # between batches nothing is in hand, so what is pending here was lost on its way
        if self._door.is_due(now_s) and (entries := self._door.found_again(now_s, count=count)):
            return entries
        return self._door.read(count=count, block_ms=self._settings.block_ms)

    def _oldest_policy_version(self, policy: PublishedPolicy | None) -> int:
        if self._settings.version_window is None:
            return 0
        return oldest_allowed(policy.policy_version if policy else 0, self._settings.version_window)

    def _judge(self, entry: RawEntry, oldest: int, fingerprint: str) -> MatchVerdict:
        try:
            record = self._decode(entry)
            _check_processor(record, fingerprint)
        except RecordError as exc:
            return self._rejected(entry, exc.reason, str(exc))
        if record.purpose == "train" and record.policy_version < oldest:
            return MatchVerdict(entry=entry, outcome="dropped", reason="stale")
        outcome = match_record(record, self._tools)
        self._metrics.on_counters(outcome.counters)
        if outcome.parse_failure is not None and self._dump is not None:
            self._dump.write(outcome.parse_failure)
        return self._verdict(entry, outcome)

    def _decode(self, entry: RawEntry) -> SegmentRecord:
        if entry.kind != SegmentRecord.KIND:
            raise RecordError(f"entry {entry.entry_id!r}: got kind {entry.kind!r:.80}, expected segment")
        if entry.body is None:
            raise BodyMissing(
                f"entry {entry.entry_id!r}: got no body of {entry.record_id!r:.80} in the broker, expected "
                f"{entry.num_bytes} bytes; see that nothing else writes to this server, and that it evicts "
                "nothing"
            )
        record = SegmentRecord.decode_body(entry.body, entry.schema_version)
        if record.record_id != entry.record_id or record.policy_version != entry.policy_version:
            raise RecordError(
                f"entry {entry.entry_id!r}: its fields say {entry.record_id!r:.80} of version "
                f"{entry.policy_version}, its body {record.record_id!r:.80} of {record.policy_version}"
            )
        return record

    def _verdict(self, entry: RawEntry, outcome: MatchOutcome) -> MatchVerdict:
        if outcome.rejection is not None:
            return self._rejected(entry, outcome.rejection.reason, outcome.rejection.detail)
        if outcome.evaluation is not None:
            body = codec.encode_map(outcome.evaluation.to_body())
            return MatchVerdict(entry=entry, outcome="evaluated", result_body=body)
        return MatchVerdict(entry=entry, outcome="matched", segment=outcome.segment)

    def _rejected(self, entry: RawEntry, reason: str, detail: str) -> MatchVerdict:
        log.warning("matcher: record %s rejected (%s): %s", entry.record_id, reason, detail)
        self._metrics.on_rejected(reason)
        return MatchVerdict(entry=entry, outcome="rejected", reason=reason, detail=detail)


def _check_processor(record: SegmentRecord, fingerprint: str) -> None:
    """Refuse a rollout whose images the learner would cut otherwise; it could only fail in training."""
    if fingerprint and record.images and record.processor_fingerprint != fingerprint:
        raise MalformedRecord(
            f"segment {record.record_id}: got processor_fingerprint {record.processor_fingerprint!r:.80}, "
            f"expected {fingerprint!r}; producer and learner must use one model folder and image bounds"
        )
