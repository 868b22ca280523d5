"""Whether a rollout may be matched at all: what its entry says, its policy, its processor. Pure."""

from __future__ import annotations

from broker_schemas.broker.policy import PublishedPolicy
from broker_schemas.client import segment_line
from broker_schemas.errors import LineDiffers, MalformedRecord, VersionUnknown
from broker_schemas.records.records import SegmentRecord

NUMBERS: frozenset[int] = frozenset({1, 3, 6, 8})


def check_admission(record: SegmentRecord, *, line: str, policy: PublishedPolicy | None) -> None:
    """Raise a RecordError where ``record`` is not what its line in the log says, or was made by no policy.

    ``line`` is empty where the entry has none (written before there was one).
    """
    where = f"segment {record.record_id}"
    if line and _columns(line) != _columns(segment_line(record)):
        raise LineDiffers(
            f"{where}: its line in the log says {line!r:.200}, its body {segment_line(record)!r:.200}; both "
            "must say the same, the audit reads the line"
        )
    if policy is None:
        return
    newest = max([record.policy_version, *(version for version, _ in record.version_spans)])
    if newest > policy.policy_version:
        raise VersionUnknown(
            f"{where}: got policy version {newest}, expected at most {policy.policy_version}, the current one"
        )
    fingerprint = policy.processor_fingerprint
    if fingerprint and record.processor_fingerprint != fingerprint:
        raise MalformedRecord(
            f"{where}: got processor_fingerprint {record.processor_fingerprint!r:.80}, expected "
            f"{fingerprint!r}; producer and learner must use one model folder and image bounds"
        )


def _columns(line: str) -> list[str | int]:
    columns = line.split("\t")
    return [
        int(text) if place in NUMBERS and text.lstrip("-").isdigit() and len(text) < 20 else text
        for place, text in enumerate(columns)
    ]
