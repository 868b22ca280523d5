"""Processes: a row for each producer, matcher, learner process and rank, each kind with its variable."""

from __future__ import annotations

from typing import Final

from rollstream.watch.dashboards.panels import Choice, Dashboard, Panel, Query, Row
from rollstream.watch.dashboards.queries import ROLLOUTS_A_SECOND, TOKENS_A_SECOND, mean, rate, series


def _processes(role: str, title: str) -> Choice:
    """Return the choice among the addresses of a role's processes."""
    found = series("rollstream_build_info", f'role="{role}"')
    return Choice(role, title, found, "instance", takes_all=True)


def _of(role: str) -> str:
    return f'instance=~"${role}"'


def _rate(name: str, role: str, *matchers: str) -> str:
    return f"sum({rate(name, _of(role), *matchers)})"


def _panels_of_process(role: str) -> tuple[Panel, Panel]:
    return (
        Panel(
            title="Memory",
            meaning="Resident bytes of the process.",
            unit="bytes",
            width=6,
            queries=(Query(f"sum({series('process_resident_memory_bytes', _of(role))})", "resident"),),
        ),
        Panel(
            title="Processor",
            meaning="Seconds of processor time a second; 1 is a full core.",
            unit="none",
            width=6,
            queries=(Query(_rate("process_cpu_seconds_total", role), "cores"),),
        ),
    )


_PRODUCERS = Row(
    "Producer $producer",
    (
        Panel(
            title="Share of its time",
            meaning="Generating, waiting for room in the broker, waiting out trouble.",
            unit="percentunit",
            highest=1,
            width=6,
            queries=(
                Query(_rate("rollstream_generation_seconds_sum", "producer"), "generates"),
                Query(_rate("rollstream_producer_wait_seconds_total", "producer"), "waits for room"),
                Query(_rate("rollstream_producer_pause_seconds_total", "producer"), "waits out trouble"),
            ),
        ),
        Panel(
            title="Tokens",
            meaning="Generated a second.",
            unit=TOKENS_A_SECOND,
            width=6,
            queries=(Query(_rate("rollstream_rollout_tokens_total", "producer"), "tokens"),),
        ),
        *_panels_of_process("producer"),
        Panel(
            title="Policy version",
            meaning="In use here, and in force.",
            width=6,
            queries=(
                Query(f"max({series('rollstream_producer_policy_version', _of('producer'))})", "in use"),
                Query(f"max({series('rollstream_policy_version')})", "in force"),
            ),
        ),
    ),
    each="producer",
)
_MATCHERS = Row(
    "Matcher $matcher",
    (
        Panel(
            title="Matched",
            meaning="Rollouts a second, all outcomes.",
            unit=ROLLOUTS_A_SECOND,
            width=6,
            queries=(Query(_rate("rollstream_matches_total", "matcher"), "rollouts"),),
        ),
        Panel(
            title="Time of a rollout",
            meaning="Mean seconds to match one.",
            unit="s",
            width=6,
            queries=(Query(mean("rollstream_match_seconds", _of("matcher")), "match"),),
        ),
        *_panels_of_process("matcher"),
    ),
    each="matcher",
)
_LEARNERS = Row(
    "Learner process $learner",
    (
        Panel(
            title="Time of a step",
            meaning="Mean seconds of an optimizer step.",
            unit="s",
            width=6,
            queries=(Query(mean("rollstream_learner_step_seconds", _of("learner")), "step"),),
        ),
        Panel(
            title="Busy and waiting",
            meaning="Share of time, told for all ranks; at the line LearnerWaiting fires.",
            unit="percentunit",
            highest=1,
            width=6,
            steps=((None, "green"), (0.2, "orange")),
            queries=(
                Query(_rate("rollstream_learner_busy_seconds_total", "learner"), "busy"),
                Query(_rate("rollstream_learner_wait_seconds_total", "learner"), "waits"),
            ),
        ),
        *_panels_of_process("learner"),
    ),
    each="learner",
)
_RANKS = Row(
    "Rank $rank",
    (
        Panel(
            title="Ready depth",
            meaning="Packs that wait for this rank; at the limit the oldest is dropped.",
            width=12,
            queries=(
                Query(series("rollstream_ready_depth_packs", 'rank=~"$rank"'), "rank {{rank}}"),
                Query(series("rollstream_queue_limit_packs"), "limit", is_limit=True),
            ),
        ),
    ),
    each="rank",
)

PROCESSES: Final = Dashboard(
    uid="rollstream-processes",
    title="rollstream: processes",
    meaning="One row for each producer, matcher, learner process and rank: which of them is the odd one?",
    rows=(_PRODUCERS, _MATCHERS, _LEARNERS, _RANKS),
    choices=(
        _processes("producer", "Producers"),
        _processes("matcher", "Matchers"),
        _processes("learner", "Learner processes"),
        Choice("rank", "Ranks", series("rollstream_ready_depth_packs"), "rank", takes_all=True),
    ),
)
