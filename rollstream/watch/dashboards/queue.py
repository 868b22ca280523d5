"""Queue: depth, lag, drops, ages, skips."""

from __future__ import annotations

from typing import Final

from rollstream.watch.dashboards.panels import Dashboard, Panel, Query, Row
from rollstream.watch.dashboards.queries import (
    EVENTS_A_SECOND,
    PACKS_A_SECOND,
    ROLLOUTS_A_SECOND,
    STEPS_A_SECOND,
    mean,
    quantile,
    rank_rate,
    series,
    sum_rate,
)

WINDOW: Final = Query(series("rollstream_version_window_versions"), "window", is_limit=True)

_DEPTH = Row(
    "Depth and age",
    (
        Panel(
            title="Ready depth of each rank",
            meaning="Packs that wait for a learner rank; at the limit the oldest is dropped.",
            queries=(
                Query(series("rollstream_ready_depth_packs"), "rank {{rank}}"),
                Query(series("rollstream_queue_limit_packs"), "limit", is_limit=True),
            ),
        ),
        Panel(
            title="Length of the streams",
            meaning="Entries. events are trimmed behind the archive; rejected is bounded.",
            queries=(Query(series("rollstream_stream_length_records"), "{{stream}}"),),
        ),
        Panel(
            title="Age of the oldest entry",
            meaning="How long the oldest has waited; 0 for an empty stream.",
            unit="s",
            queries=(Query(series("rollstream_oldest_waiting_seconds"), "{{stream}}"),),
        ),
        Panel(
            title="Rollouts on their way",
            meaning="In flight: asked for, did not come yet. Outstanding: not matched yet.",
            queries=(
                Query(series("rollstream_in_flight_rollouts"), "in flight"),
                Query(series("rollstream_outstanding_rollouts"), "outstanding"),
            ),
        ),
        Panel(
            title="Steps from request to claim",
            meaning="Optimizer steps until a rollout is ready for a claim; demand reckons with it.",
            queries=(Query(series("rollstream_generation_steps"), "generation"),),
        ),
        Panel(
            title="Open claims",
            meaning="Steps claimed and not covered by a checkpoint.",
            queries=(Query(series("rollstream_open_claims_steps"), "steps"),),
        ),
        Panel(
            title="Packer's buffer",
            meaning="Segments the packer holds.",
            queries=(Query(series("rollstream_pack_buffer_segments"), "segments"),),
        ),
        Panel(
            title="Consumer groups",
            meaning="Lag: not handed out. Pending: handed out, not settled.",
            queries=(
                Query(series("rollstream_group_lag_records"), "{{group}} lag"),
                Query(series("rollstream_group_pending_records"), "{{group}} pending"),
            ),
        ),
    ),
)

_LAG = Row(
    "Version lag",
    (
        Panel(
            title="Mean lag at each stage",
            meaning="Policy versions behind; above the window nothing may be trained on.",
            queries=(
                Query(mean("rollstream_lag_versions", by="stage"), "{{stage}}"),
                WINDOW,
            ),
        ),
        Panel(
            title="Lag of trained segments",
            meaning="As the learner counts it, by segment.",
            queries=(
                Query(mean("rollstream_learner_claim_lag_versions", over="max"), "mean"),
                Query(quantile(0.9, "rollstream_learner_claim_lag_versions"), "p90"),
                WINDOW,
            ),
        ),
        Panel(
            title="Policy versions",
            meaning="In force, and the newest that producers use.",
            queries=(
                Query(series("rollstream_policy_version"), "in force"),
                Query(f"max({series('rollstream_producer_policy_version')})", "newest in use"),
                Query(f"min({series('rollstream_producer_policy_version')})", "oldest in use"),
            ),
        ),
    ),
)

_LOST = Row(
    "Drops, skips, rejections",
    (
        Panel(
            title="Dropped rollouts by reason",
            meaning="Rollouts a second that will not be trained.",
            unit=ROLLOUTS_A_SECOND,
            is_stacked=True,
            queries=(Query(sum_rate("rollstream_dropped_rollouts_total", by="reason"), "{{reason}}"),),
        ),
        Panel(
            title="Dropped packs by reason",
            meaning="Packs a second that the packer's commits pushed out.",
            unit=PACKS_A_SECOND,
            queries=(Query(sum_rate("rollstream_packer_dropped_packs_total", by="reason"), "{{reason}}"),),
        ),
        Panel(
            title="Packs below the fill ratio",
            meaning="Packs a second that left below training.packing_min_fill_ratio.",
            unit=PACKS_A_SECOND,
            queries=(Query(sum_rate("rollstream_underfilled_packs_total"), "underfilled"),),
        ),
        Panel(
            title="B steps skipped by reason",
            meaning="Steps a second that became A.",
            unit=STEPS_A_SECOND,
            queries=(
                Query(rank_rate("rollstream_b_step_skipped_due_to_queue_total", by="reason"), "{{reason}}"),
            ),
        ),
        Panel(
            title="Rejected rollouts by reason",
            meaning="Rollouts a second; raw bytes and reason stand in the stream rejected.",
            unit=ROLLOUTS_A_SECOND,
            is_stacked=True,
            queries=(Query(sum_rate("rollstream_rejected_rollouts_total", by="reason"), "{{reason}}"),),
        ),
        Panel(
            title="Came twice, came late",
            meaning="Recognised by their id; both do no harm.",
            unit=ROLLOUTS_A_SECOND,
            queries=(
                Query(sum_rate("rollstream_duplicate_rollouts_total"), "duplicates"),
                Query(sum_rate("rollstream_late_rollouts_total"), "late"),
                Query(sum_rate("rollstream_rollouts_total", by="status"), "pushed: {{status}}"),
            ),
        ),
        Panel(
            title="Share dropped",
            meaning="Dropped of pushed, over five minutes; at the line DropsRising fires.",
            steps=((None, "green"), (0.1, "orange")),
            unit="percentunit",
            queries=(Query(series("rollstream:drop_share:ratio5m"), "dropped"),),
        ),
    ),
)

_WORK = Row(
    "Requests and upkeep",
    (
        Panel(
            title="Asked for",
            meaning="Rollouts a second that are asked for, and those asked for again.",
            unit=ROLLOUTS_A_SECOND,
            queries=(
                Query(sum_rate("rollstream_rollouts_requested_total"), "asked for"),
                Query(sum_rate("rollstream_rollouts_asked_again_total"), "asked again"),
            ),
        ),
        Panel(
            title="Requests in trouble",
            meaning="A second: run again, given up, and entries that are no job.",
            unit=EVENTS_A_SECOND,
            queries=(
                Query(sum_rate("rollstream_requests_reissued_total"), "requests run again"),
                Query(sum_rate("rollstream_requests_failed_total", by="reason"), "given up: {{reason}}"),
                Query(sum_rate("rollstream_broken_jobs_total"), "no job, in the queue"),
                Query(sum_rate("rollstream_broken_failed_jobs_total"), "no job, among the failed"),
            ),
        ),
        Panel(
            title="Generation",
            meaning="Seconds for one chunk.",
            unit="s",
            queries=(
                Query(quantile(0.5, "rollstream_generation_seconds"), "p50"),
                Query(quantile(0.9, "rollstream_generation_seconds"), "p90"),
            ),
        ),
        Panel(
            title="Weights that could not be loaded",
            meaning="Failures within five minutes; from the line on SyncFailing fires.",
            steps=((None, "green"), (1.0, "red")),
            queries=(Query(series("rollstream:sync_failures:increase5m"), "failures"),),
        ),
        Panel(
            title="Group idle, archive behind",
            meaning="Seconds since any consumer asked; seconds of log not archived yet.",
            unit="s",
            queries=(
                Query(series("rollstream_group_idle_seconds"), "{{group}} idle"),
                Query(series("rollstream_archive_behind_seconds"), "archive behind"),
            ),
        ),
        Panel(
            title="Archived",
            meaning="Events a second.",
            unit="suffix: events/s",
            queries=(Query(sum_rate("rollstream_archived_events_total"), "events"),),
        ),
        Panel(
            title="Size of the archive",
            meaning="Bytes on disk.",
            unit="bytes",
            queries=(Query(series("rollstream_archive_size_bytes"), "archive"),),
        ),
    ),
)

QUEUE: Final = Dashboard(
    uid="rollstream-queue",
    title="rollstream: queue",
    meaning="Depth, lag, drops, ages and skips of the asynchronous queue.",
    rows=(_DEPTH, _LAG, _LOST, _WORK),
)
