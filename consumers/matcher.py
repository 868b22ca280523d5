"""The matcher's loop: reads rollouts, matches each, commits what became of them in one transition.

While a batch is matched the one before it is committed and the one after it is read.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from broker_schemas.broker.group_reader import IDLE_MS
from broker_schemas.broker.matcher_door import MatcherDoor, MatchVerdict, RawEntry
from broker_schemas.broker.policy import PublishedPolicy, read_policy
from broker_schemas.broker.role_loop import keep_stepping
from broker_schemas.broker.trouble_log import RoundCounts
from broker_schemas.errors import BodyMissing, BrokerError, RecordError
from broker_schemas.records import codec
from broker_schemas.records.freshness import oldest_allowed
from broker_schemas.records.records import SegmentRecord
from consumers.admission import check_admission
from consumers.metrics import MatcherMetrics
from consumers.record_matching import MatcherTools, MatchOutcome, ParseFailure, match_record

log = logging.getLogger(__name__)
# a record found again is judged alone; dying with it in hand is the second death
TRIES_ALONE = 1
# what is read ahead waits for a whole batch, and another takes over what waits for long
READ_AHEAD_BELOW_S = IDLE_MS / 5000


@dataclass(frozen=True, kw_only=True)
class MatcherSettings:
    """``version_window`` None: every version is welcome (on-policy variants order their own rollouts)."""

    batch_size: int
    version_window: int | None
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
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(failure)) + "\n")
        except OSError as exc:
            log.error("matcher: no more parse failures are written to %s: %s", self.path, exc)
            self._num_written = self.at_most
            return
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
        self._rejections = RoundCounts()
        self._outlived: set[bytes] = set()
        self._hands = ThreadPoolExecutor(max_workers=2, thread_name_prefix="matcher")
        self._ahead: list[RawEntry] = []
        self._committing: Future[None] | None = None
        self._last_batch_s = 0.0

    def loop(self, stop: threading.Event) -> None:
        """Step until ``stop``, then finish what was read ahead; a broker that is away is waited for."""
        keep_stepping(
            lambda: self.step(time.monotonic()), stop, role="matcher", on_trouble=self._start_afresh
        )
        try:
            if self._ahead:
                self._match(self._taken_ahead())
            self._finish_commit()
        except BrokerError as exc:
            log.warning("matcher: %s; what it held is found again by another", exc)

    def step(self, now_s: float) -> int:
        """Match one batch; return how many rollouts it held. Raises BrokerError.

        It is committed on return, unless the next one is read already: then while that is matched.
        """
        count = self._settings.batch_size
        if self._door.is_due(now_s):
            # what is pending and neither read ahead nor under way was lost on its way
            self._finish_commit()
            held = {entry.entry_id for entry in self._ahead}
            if entries := self._door.found_again(now_s, count=count, held=held):
                # one of them may have killed a matcher: each alone, so that the next death names it
                for entry in entries:
                    self._match_alone(entry)
                return len(entries)
        entries = self._taken_ahead() or self._door.read(count=count, block_ms=self._settings.block_ms)
        if entries:
            started_s, reading = time.monotonic(), None
            if len(entries) == count and self._last_batch_s < READ_AHEAD_BELOW_S:  # more may wait
                reading = self._hands.submit(self._door.read, count=count, block_ms=None)
            self._match(entries)
            self._last_batch_s = time.monotonic() - started_s
            self._ahead = reading.result() if reading is not None else []
        if not self._ahead:
            self._finish_commit()
        return len(entries)

    def _taken_ahead(self) -> list[RawEntry]:
        entries, self._ahead = self._ahead, []
        return entries

    def _start_afresh(self) -> None:
        """Forget what was under way: what is still pending is found again."""
        self._ahead = []
        with suppress(BrokerError):
            self._finish_commit()
        self._door.look_again()

    def _finish_commit(self) -> None:
        """Wait for the commit that is under way; raises what it met."""
        committing, self._committing = self._committing, None
        if committing is not None:
            committing.result()

    def _match_alone(self, entry: RawEntry) -> None:
        """Match an entry with a note in the broker, for whoever dies over it; to outlive it is no death."""
        tries = 1 if entry.entry_id in self._outlived else self._door.note_try(entry)
        self._outlived.add(entry.entry_id)
        self._match([entry], tries=tries)
        self._finish_commit()
        self._outlived.discard(entry.entry_id)
        self._door.forget_tries(entry)

    def _match(self, entries: Sequence[RawEntry], *, tries: int = 1) -> None:
        started_s = time.monotonic()
        policy = read_policy(self._door.broker)
        oldest = self._oldest_policy_version(policy)
        verdicts = [
            self._judge(entry, oldest, policy)
            if tries <= TRIES_ALONE
            else self._rejected(entry, "killed_its_matcher", f"a matcher died {tries} times while it had it")
            for entry in entries
        ]
        send = self._door.prepare_commit(verdicts, oldest_policy_version=oldest)
        seconds = time.monotonic() - started_s
        self._finish_commit()
        self._committing = self._hands.submit(self._commit, send, seconds)

    def _commit(self, send: Callable[[], list[str]], seconds: float) -> None:
        self._metrics.on_batch(send(), seconds)

    def _oldest_policy_version(self, policy: PublishedPolicy | None) -> int:
        if self._settings.version_window is None:
            return 0
        return oldest_allowed(policy.policy_version if policy else 0, self._settings.version_window)

    def _judge(self, entry: RawEntry, oldest: int, policy: PublishedPolicy | None) -> MatchVerdict:
        try:
            record = self._decode(entry)
            check_admission(record, line=entry.line, policy=policy)
            if record.purpose == "train" and record.policy_version < oldest:
                return MatchVerdict(entry=entry, outcome="dropped", reason="stale")
            outcome = match_record(record, self._tools)
        except RecordError as exc:
            return self._rejected(entry, exc.reason, str(exc))
        except Exception as exc:
            # whatever a record does to us, it costs that record alone
            log.exception("matcher: record %s could not be judged", entry.record_id)
            return self._rejected(entry, "judging_failed", f"{type(exc).__name__}: {exc}")
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
        if number := self._rejections.due(reason):
            named = f"matcher: record {entry.record_id} rejected ({reason})"
            log.warning("%s: %s; %d of that kind since its start", named, detail, number)
        self._metrics.on_rejected(reason)
        return MatchVerdict(entry=entry, outcome="rejected", reason=reason, detail=detail)
