"""Overview: is the run healthy, and where is the bottleneck."""

from __future__ import annotations

from typing import Final

from rollstream.watch.dashboards.panels import Dashboard, Panel, Query, Row
from rollstream.watch.dashboards.queries import (
    ROLLOUTS_A_SECOND,
    TOKENS_A_SECOND,
    mean,
    quantile,
    rank_rate,
    rate,
    series,
    sum_rate,
)
from rollstream.watch.dashboards.remedies import REMEDIES

_BAD_BELOW_ONE: Final = ((None, "red"), (1.0, "green"))
_BAD_AT_ZERO: Final = ((None, "red"), (1.0, "green"))
_BAD_ABOVE_ZERO: Final = ((None, "green"), (1.0, "red"))

# a column of its own for the remedy, which the table tells by the alert's name
FIRING: Final = (
    'max by (alertname, severity, remedy) (label_replace(ALERTS{alertstate="firing", run="$run"}, '
    '"remedy", "$1", "alertname", "(.+)"))'
)
F1: Final = 'metric="eval_rollout_f1"'

_HEALTH = Row(
    "Healthy?",
    (
        Panel(
            title="Alerts",
            meaning="Alerts that fire for this run.",
            kind="stat",
            width=3,
            height=4,
            steps=_BAD_ABOVE_ZERO,
            queries=(Query('sum(ALERTS{alertstate="firing", run="$run"}) or vector(0)'),),
        ),
        Panel(
            title="Broker",
            meaning="1 while the broker answers.",
            kind="stat",
            width=3,
            height=4,
            steps=_BAD_AT_ZERO,
            queries=(Query(f"min({series('rollstream_broker_up')})"),),
        ),
        Panel(
            title="Producers",
            meaning="Producers whose endpoint answers.",
            kind="stat",
            width=3,
            height=4,
            steps=_BAD_AT_ZERO,
            queries=(Query(series("rollstream:producers_up:sum")),),
        ),
        Panel(
            title="Matchers",
            meaning="Matchers that asked for work in the last minute.",
            kind="stat",
            width=3,
            height=4,
            steps=_BAD_AT_ZERO,
            queries=(Query(series("rollstream_group_consumers", 'group="matcher"')),),
        ),
        Panel(
            title="Ranks up",
            meaning="Learner ranks that answer, of those that should; nothing once all steps are done.",
            kind="stat",
            unit="percentunit",
            width=3,
            height=4,
            steps=_BAD_BELOW_ONE,
            queries=(
                Query(
                    f"{series('rollstream:ranks_up:sum')} / on (run) "
                    f"({series('rollstream:expected_ranks:max')} > 0)"
                ),
            ),
        ),
        Panel(
            title="Optimizer steps",
            meaning="Steps committed.",
            kind="stat",
            width=3,
            height=4,
            queries=(Query(f"max({series('rollstream_committed_steps_total')})"),),
        ),
        Panel(
            title="Policy version",
            meaning="Version of the weights in force.",
            kind="stat",
            width=3,
            height=4,
            queries=(Query(f"max({series('rollstream_policy_version')})"),),
        ),
        Panel(
            title="F1",
            meaning="F1 of the last evaluation.",
            kind="stat",
            unit="percentunit",
            width=3,
            height=4,
            queries=(
                Query(
                    f"max({series('rollstream_evaluation', F1)} or "
                    f"{series('rollstream_round_evaluation', F1)})"
                ),
            ),
        ),
    ),
)

_FIRING = Row(
    "What fires, and what to do",
    (
        Panel(
            title="Firing alerts",
            meaning="Alerts of this run that fire now, with their remedy; a click on it opens the runbook.",
            kind="table",
            width=24,
            height=6,
            remedies=REMEDIES,
            queries=(Query(FIRING),),
        ),
    ),
)

_BOTTLENECK = Row(
    "Where is the bottleneck?",
    (
        Panel(
            title="Busy and waiting",
            meaning="Share of time. Learner waiting: rollouts come too slowly. Producers waiting: too fast. "
            "The line at 20 %: above it LearnerWaiting fires.",
            steps=((None, "green"), (0.2, "orange")),
            unit="percentunit",
            highest=1,
            queries=(
                Query(rank_rate("rollstream_learner_busy_seconds_total"), "learner busy"),
                Query(rank_rate("rollstream_learner_wait_seconds_total"), "learner waits"),
                Query(f"avg({rate('rollstream_generation_seconds_sum')})", "producers generate"),
                Query(f"avg({rate('rollstream_producer_wait_seconds_total')})", "producers wait for room"),
                Query(
                    f"avg({rate('rollstream_producer_pause_seconds_total')})", "producers wait out trouble"
                ),
            ),
        ),
        Panel(
            title="Waiting in front of each stage",
            meaning="Rollouts. What grows is in front of the stage that is too slow; the learner's: below.",
            queries=(
                Query(series("rollstream_in_flight_rollouts"), "producers"),
                Query(series("rollstream_stream_length_records", 'stream="segments"'), "matchers"),
                Query(series("rollstream_stream_length_records", 'stream="matched"'), "packer"),
            ),
        ),
        Panel(
            title="Rollouts through each stage",
            meaning="Rollouts a second; in balance the lines lie on each other.",
            unit=ROLLOUTS_A_SECOND,
            queries=(Query(sum_rate("rollstream_rollouts_by_stage_total", by="stage"), "{{stage}}"),),
        ),
        Panel(
            title="Tokens",
            meaning="Tokens a second that are generated, packed and trained.",
            unit=TOKENS_A_SECOND,
            queries=(
                Query(series("rollstream:rollout_tokens:rate1m"), "generated"),
                Query(sum_rate("rollstream_packed_tokens_total"), "packed"),
                Query(series("rollstream:learner_tokens:rate1m"), "trained {{kind}}"),
            ),
        ),
        Panel(
            title="Ready depth of each rank",
            meaning="Packs that wait; zero for long: B steps are skipped; at the limit the oldest goes.",
            queries=(
                Query(series("rollstream_ready_depth_packs"), "rank {{rank}}"),
                Query(series("rollstream_queue_limit_packs"), "limit", is_limit=True),
            ),
        ),
        Panel(
            title="Time of one piece of work",
            meaning="Mean seconds: a generation chunk, matching one rollout, an optimizer step.",
            unit="s",
            queries=(
                Query(mean("rollstream_generation_seconds"), "generation chunk"),
                Query(mean("rollstream_policy_load_seconds"), "load of a policy"),
                Query(mean("rollstream_match_seconds"), "match"),
                Query(mean("rollstream_learner_step_seconds", over="max"), "optimizer step"),
                Query(quantile(0.9, "rollstream_learner_step_seconds"), "optimizer step p90"),
            ),
        ),
    ),
)

_MEANS = Row(
    "What it takes",
    (
        Panel(
            title="Producers wanted",
            meaning="Producers that could work at once, and those that are up.",
            queries=(
                Query(series("rollstream_wanted_producers"), "wanted"),
                Query(series("rollstream:producers_up:sum"), "up"),
            ),
        ),
        Panel(
            title="Jobs that wait",
            meaning="Requests that no producer has taken yet.",
            queries=(Query(series("rollstream_waiting_jobs"), "jobs"),),
        ),
        Panel(
            title="Time to stale",
            meaning="Publications that the oldest ready pack still outlasts; below zero it is dropped.",
            queries=(
                Query(series("rollstream_ready_until_stale_versions"), "publications left"),
                Query(
                    f"{series('rollstream_policy_version')} - on (run) "
                    f"{series('rollstream_ready_lowest_version')}",
                    "behind the policy",
                ),
            ),
        ),
        Panel(
            title="Cost of a trained token",
            meaning="Busy seconds of all producers and learner ranks together.",
            unit="s",
            queries=(Query(series("rollstream:cost_per_token:seconds5m"), "a token"),),
        ),
    ),
)

_BROKER = Row(
    "Broker and losses on the way",
    (
        Panel(
            title="Bytes",
            meaning="Held by the run, its budget, and what the server uses for all runs.",
            unit="bytes",
            queries=(
                Query(series("rollstream_run_bytes"), "run"),
                Query(series("rollstream_run_budget_bytes"), "budget", is_limit=True),
                Query(series("rollstream_broker_memory_bytes"), "server"),
            ),
        ),
        Panel(
            title="Budget used",
            meaning="Of broker.max_bytes, and of the server's maxmemory (0 without one).",
            kind="bargauge",
            unit="percentunit",
            highest=1,
            steps=((None, "green"), (0.7, "yellow"), (0.9, "red")),
            queries=(
                Query(series("rollstream:budget_used:ratio"), "run"),
                Query(series("rollstream:broker_memory_used:ratio"), "server"),
            ),
        ),
        Panel(
            title="Dropped and rejected",
            meaning="Rollouts a second.",
            unit=ROLLOUTS_A_SECOND,
            queries=(
                Query(sum_rate("rollstream_dropped_rollouts_total"), "dropped"),
                Query(sum_rate("rollstream_rejected_rollouts_total"), "rejected"),
            ),
        ),
    ),
)

OVERVIEW: Final = Dashboard(
    uid="rollstream-overview",
    title="rollstream: overview",
    meaning="Is the run healthy, and where is the bottleneck?",
    rows=(_HEALTH, _FIRING, _BOTTLENECK, _MEANS, _BROKER),
)
