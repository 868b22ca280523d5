"""Learning: losses, matching, packing, evaluation."""

from __future__ import annotations

from typing import Final

from rollstream.watch.dashboards.panels import Dashboard, Panel, Query, Row
from rollstream.watch.dashboards.queries import (
    EVENTS_A_SECOND,
    OBJECTS_A_SECOND,
    PACKS_A_SECOND,
    ROLLOUTS_A_SECOND,
    SEGMENTS_A_SECOND,
    STEPS_A_SECOND,
    TOKENS_A_SECOND,
    mean,
    rank_rate,
    series,
    sum_rate,
)

SHOWN_NUMBERS: Final = 'metric=~"eval_rollout_(f1|f1_50|f1_class_50|label_accuracy|map_50|map)"'


def _loss(*matchers: str, by: str) -> str:
    return f"max by ({by}) ({series('rollstream_learner_loss', *matchers)})"


_LOSSES = Row(
    "Losses",
    (
        Panel(
            title="Loss",
            meaning="Total of the last step of each kind.",
            unit="none",
            queries=(Query(_loss('term="total"', by="kind"), "{{kind}}"),),
        ),
        Panel(
            title="Terms of B steps",
            meaning="Hard CE, and the terms of the coordinate loss.",
            unit="none",
            queries=(Query(_loss('kind="B"', 'term=~"ce|soft_ce|w1|gate"', by="term"), "{{term}}"),),
        ),
        Panel(
            title="Coordinates of B steps",
            meaning="Matched slots of the rollout's prefix, and of the appended tail.",
            unit="none",
            queries=(Query(_loss('kind="B"', 'term=~"coord_prefix|coord_tail"', by="term"), "{{term}}"),),
        ),
        Panel(
            title="Gradient norm",
            meaning="Before clipping.",
            unit="none",
            queries=(Query(f"max({series('rollstream_learner_grad_norm')})", "norm"),),
        ),
        Panel(
            title="Learning rate",
            meaning="Of the last step.",
            unit="none",
            queries=(Query(f"max({series('rollstream_learner_learning_rate')})", "rate"),),
        ),
        Panel(
            title="Evaluation",
            meaning="Of the validation set; f1: any class at the gate; f1_class_50, map: right class.",
            unit="percentunit",
            queries=(
                Query(
                    f"max by (metric) ({series('rollstream_evaluation', SHOWN_NUMBERS)} or "
                    f"{series('rollstream_round_evaluation', SHOWN_NUMBERS)})",
                    "{{metric}}",
                ),
            ),
        ),
        Panel(
            title="Rounds of evaluation",
            meaning="Policy version of the last round by the producers, and the one in force.",
            queries=(
                Query(f"max({series('rollstream_evaluated_policy_version')})", "evaluated"),
                Query(f"max({series('rollstream_policy_version')})", "in force"),
            ),
        ),
        Panel(
            title="Round under way",
            meaning="Results that are there already.",
            queries=(Query(f"max({series('rollstream_evaluation_waiting_records')})", "results"),),
        ),
    ),
)

_STEPS = Row(
    "Steps",
    (
        Panel(
            title="Steps by kind",
            meaning="Optimizer steps a second.",
            unit=STEPS_A_SECOND,
            queries=(Query(rank_rate("rollstream_learner_steps_total", by="kind"), "{{kind}}"),),
        ),
        Panel(
            title="B ratio",
            meaning="Realised since the start, and by schedule.",
            unit="percentunit",
            queries=(
                Query(f"max({series('rollstream_learner_b_step_ratio')})", "realised"),
                Query(series("rollstream_scheduled_b_step_ratio"), "scheduled"),
            ),
        ),
        Panel(
            title="Segments",
            meaning="Trained a second, by kind.",
            unit=SEGMENTS_A_SECOND,
            queries=(Query(rank_rate("rollstream_learner_segments_total", by="kind"), "{{kind}}"),),
        ),
        Panel(
            title="Tokens",
            meaning="Trained a second, by kind.",
            unit=TOKENS_A_SECOND,
            queries=(Query(rank_rate("rollstream_learner_tokens_total", by="kind"), "{{kind}}"),),
        ),
        Panel(
            title="Learner waiting",
            meaning="Share of its time, over five minutes. At the line LearnerWaiting fires.",
            steps=((None, "green"), (0.2, "orange")),
            unit="percentunit",
            queries=(Query(series("rollstream:learner_wait:ratio5m"), "waits"),),
        ),
        Panel(
            title="Published",
            meaning="Policy version last published.",
            queries=(Query(f"max({series('rollstream_learner_policy_version')})", "policy version"),),
        ),
        Panel(
            title="Saved",
            meaning="Optimizer steps that a checkpoint covers, and those that are committed.",
            queries=(
                Query(f"max({series('rollstream_learner_checkpoint_steps')})", "in a checkpoint"),
                Query(f"max({series('rollstream_committed_steps_total')})", "committed"),
            ),
        ),
        Panel(
            title="Model FLOPs utilisation",
            meaning="Of the last step, over the peak of its GPUs; 0 where that is not known.",
            unit="percentunit",
            queries=(Query(f"max({series('rollstream_learner_model_flops_ratio')})", "utilisation"),),
        ),
        Panel(
            title="Peak memory",
            meaning="Most of any rank.",
            unit="bytes",
            queries=(Query(f"max({series('rollstream_learner_peak_memory_bytes')})", "peak"),),
        ),
        Panel(
            title="Checkpoints, publications, syncs",
            meaning="Seconds each second; checkpoint_held is what training waited for checkpoints.",
            unit="percentunit",
            queries=(Query(rank_rate("rollstream_learner_milestone_seconds_total", by="what"), "{{what}}"),),
        ),
        Panel(
            title="Decided steps",
            meaning="As the log has them.",
            queries=(Query(f"max by (kind) ({series('rollstream_decided_steps_total')})", "{{kind}}"),),
        ),
    ),
)


def _objects(*names: str) -> Query:
    matcher = f'counter=~"{"|".join(names)}"'
    return Query(sum_rate("rollstream_rollout_objects_total", matcher, by="counter"), "{{counter}}")


_MATCHING = Row(
    "Matching",
    (
        Panel(
            title="Objects",
            meaning="A second: valid predictions, ground truth, matched, appended because unmatched.",
            unit=OBJECTS_A_SECOND,
            queries=(_objects("valid_objects", "ground_truth_objects", "matched", "unmatched_appended"),),
        ),
        Panel(
            title="Trouble in rollouts",
            meaning="A second: truncated, without any valid object, refused by the gate, without a target.",
            unit=EVENTS_A_SECOND,
            queries=(
                _objects(
                    "truncated", "invalid_rollouts", "gating_rejections", "targets_excluded", "dropped_.*"
                ),
            ),
        ),
        Panel(
            title="Outcomes",
            meaning="Rollouts a second that matchers committed.",
            unit=ROLLOUTS_A_SECOND,
            queries=(Query(sum_rate("rollstream_matches_total", by="outcome"), "{{outcome}}"),),
        ),
        Panel(
            title="Recall of trained rollouts",
            meaning="Matched of all ground truth, in the rollouts that were trained.",
            unit="percentunit",
            queries=(
                Query(
                    rank_rate("rollstream_learner_rollout_objects_total", 'counter="matched"')
                    + " / clamp_min("
                    + rank_rate("rollstream_learner_rollout_objects_total", 'counter="ground_truth_objects"')
                    + ", 1e-9)",
                    "recall",
                ),
            ),
        ),
    ),
)

_PACKING = Row(
    "Packing",
    (
        Panel(
            title="Fill",
            meaning="Mean tokens over capacity: as packed, and as trained by kind.",
            unit="percentunit",
            highest=1,
            queries=(
                Query(mean("rollstream_pack_fill_ratio"), "packed"),
                Query(mean("rollstream_learner_pack_fill_ratio", by="kind", over="max"), "trained {{kind}}"),
            ),
        ),
        Panel(
            title="Packs by reason",
            meaning="A second, by why they left the buffer.",
            unit=PACKS_A_SECOND,
            queries=(Query(sum_rate("rollstream_packs_total", by="reason"), "{{reason}}"),),
        ),
        Panel(
            title="Segments in a pack",
            meaning="Mean over the range.",
            queries=(
                Query(
                    sum_rate("rollstream_packed_segments_total")
                    + " / clamp_min("
                    + sum_rate("rollstream_packs_total")
                    + ", 1e-9)",
                    "segments",
                ),
            ),
        ),
    ),
)

LEARNING: Final = Dashboard(
    uid="rollstream-learning",
    title="rollstream: learning",
    meaning="Losses, steps, matching, packing and evaluation.",
    rows=(_LOSSES, _STEPS, _MATCHING, _PACKING),
)
