"""Says in one sentence who waits for whom. Pure: one sample of the stack and the last steps in, words out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rollstream.show.report.counting import count, total
from rollstream.show.visible_text import one_line

HEALTHY_STATES: Final = frozenset({"running", "starting", "finished", "done", "healthy"})
NUM_RECENT_STEPS: Final = 10
_NOTABLE_WAIT_SHARE: Final = 0.1
_BACKLOG_SEGMENTS: Final = 16


def bottleneck(
    sample: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], *, queue_limit: int | None = None
) -> str:
    """Return who waits for whom, worst trouble first.

    ``sample`` is the last line of the stack's samples (empty: none yet), ``steps`` the last steps in order.
    ``queue_limit`` is the most packs a rank's queue holds, where it is known.
    """
    if not sample and not steps:
        return "nothing to see yet: no sample and no step is written"
    if is_silent(sample):
        return "the broker does not answer: nobody can go on for long"
    broken = broken_roles(sample)
    if broken:
        return f"{', '.join(broken)}: what comes after waits"
    return _queue_state(sample, steps[-NUM_RECENT_STEPS:], queue_limit)


def is_silent(sample: Mapping[str, Any]) -> bool:
    """Return whether a sample was taken while the broker did not answer: it has a time and no depths."""
    return bool(sample) and "ready_depth" not in sample


def broken_roles(sample: Mapping[str, Any]) -> list[str]:
    """Return "producer 1 is restarting" for each process that is in no healthy state."""
    return [
        one_line(f"{role.get('role', '?')} {role.get('index', '?')} is {role['state']}", 48)
        for role in roles(sample)
        if "state" in role and str(role["state"]) not in HEALTHY_STATES
    ]


def roles(sample: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the roles of a sample; none where it lists none."""
    found = sample.get("roles")
    return [role for role in found if isinstance(role, Mapping)] if isinstance(found, list) else []


def depths(sample: Mapping[str, Any]) -> list[int]:
    """Return the ready packs per rank; none where the sample does not say."""
    found = sample.get("ready_depth")
    return [item for item in found if type(item) is int] if isinstance(found, list) else []


def wait_share(steps: Sequence[Mapping[str, Any]]) -> float:
    """Return waiting over waiting and busy time of the steps; 0 for none."""
    waited, worked = total(steps, "wait_s"), total(steps, "busy_s")
    return waited / (waited + worked) if waited + worked > 0 else 0.0


def _queue_state(
    sample: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], queue_limit: int | None
) -> str:
    per_rank = depths(sample)
    shown = f"depth {'/'.join(str(depth) for depth in per_rank)}"
    share = wait_share(steps)
    if per_rank and queue_limit is not None and min(per_rank) >= queue_limit:
        return f"producers wait: queues full ({shown} of {queue_limit})"
    if per_rank and min(per_rank) == 0:
        return _scarcity(sample, steps, shown)
    if count(sample, "in_flight") == 0 and per_rank and not _backlog(sample):
        return f"producers wait: enough is queued ({shown})"
    if share >= _NOTABLE_WAIT_SHARE:
        return (
            f"learner waits {share:.0%} of its time although packs are ready ({shown or 'depth not known'})"
        )
    if backlog := _backlog(sample):
        return backlog
    known = f"learner busy {1 - share:.0%} of its time" if steps else "learner has made no step yet"
    return f"nobody waits long: {known}" + (f", {shown}" if per_rank else "")


def _scarcity(sample: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], shown: str) -> str:
    """Say why a rank has no pack: what is held up in front of it, nearest first."""
    who = "learner waits"
    skipped = sum(row.get("reason") == "queue_short" for row in steps)
    if skipped:
        who = (
            f"learner runs A instead ({skipped} of the last {len(steps)} steps were short of packs) and waits"
        )
    elif steps and steps[-1].get("kind") == "A" and wait_share(steps) < _NOTABLE_WAIT_SHARE:
        who = "learner runs A meanwhile; B waits"
    matched, segments = count(sample, "matched_waiting") or 0, count(sample, "segments_waiting") or 0
    if segments >= _BACKLOG_SEGMENTS and segments >= matched:
        return f"{who} for the matcher: {segments} rollouts are not matched yet ({shown})"
    if matched >= _BACKLOG_SEGMENTS:
        return f"{who} for the packer: {matched} matched segments make no pack yet ({shown})"
    in_flight = count(sample, "in_flight")
    if in_flight == 0:
        return f"{who} for rollouts and none is asked for ({shown}): look at the dispatcher"
    written = f", {in_flight} being written" if in_flight else ""
    return f"{who} for rollouts ({shown}{written})"


def _backlog(sample: Mapping[str, Any]) -> str:
    segments, matched = count(sample, "segments_waiting") or 0, count(sample, "matched_waiting") or 0
    if segments >= 4 * _BACKLOG_SEGMENTS:
        return f"matcher is behind: {segments} rollouts are not matched yet"
    if matched >= 16 * _BACKLOG_SEGMENTS:
        return f"packer is behind: {matched} matched segments are in no pack yet"
    return ""
