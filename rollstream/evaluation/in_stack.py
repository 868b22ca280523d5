"""Wires the evaluator: rounds of evaluation by the producers, beside training [L-8]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from broker_schemas.broker.lease import holding
from broker_schemas.records.evaluation_state import EvaluationNumbers
from configs import RunConfig
from consumers.evaluator import Evaluator, EvaluatorOutlets, EvaluatorSettings
from consumers.metrics import EvaluatorMetrics
from learner.training_log import TrainingLog
from rollstream.evaluation.evaluation import Evaluation, write_evaluation
from rollstream.run_folder import RunFolder, read_json_lines
from rollstream.wiring import access
from rollstream.wiring.dispatch import evaluation_samples
from rollstream.wiring.identity import check_folder
from rollstream.wiring.learn import sync_every_steps

POLL_S: Final = 0.5


def run_evaluator(config: RunConfig, index: int) -> None:
    """Run until a signal; a run that is not evaluated by its producers has nothing to gather and waits."""
    stop = access.stop_on_signals()
    broker = access.open_broker(config)
    check_folder(config, broker)
    metrics = EvaluatorMetrics(access.start_endpoint(config, "gather", index).registry)
    if not config.evaluates_in_stack:
        stop.wait()
        return
    folder = access.run_folder(config)
    with (
        holding(broker, "evaluator", on_loss=stop.set) as (held, _),
        TrainingLog(folder.evaluation_log) as log,
    ):
        settings = EvaluatorSettings(
            num_samples=len(evaluation_samples(config)),
            sync_every_steps=sync_every_steps(config),
            poll_s=POLL_S,
        )
        outlets = EvaluatorOutlets(
            keep=_Keeper(folder, config.rollout_matching.maskiou_gate, _image_root(config)).keep,
            write=log.write,
            written_steps=frozenset(
                int(row["optimizer_step"]) for row in read_json_lines(folder.evaluation_log)
            ),
        )
        access.say_ready(config, "gather", index, samples=settings.num_samples)
        Evaluator(held, metrics, settings, outlets).loop(stop)
    broker.close()


def _image_root(config: RunConfig) -> Path:
    return access.data_root(config, config.data.val_jsonl or config.data.train_jsonl)


class _Keeper:
    """Writes each round's numbers and first images to the run folder, as `rollstream eval` does."""

    def __init__(self, folder: RunFolder, gate: float, root: Path) -> None:
        self._folder = folder
        self._gate = gate
        self._root = root

    def keep(self, numbers: EvaluationNumbers, results: Sequence[dict[str, Any]]) -> None:
        label = f"step-{numbers.optimizer_step}"
        by_sample = sorted(results, key=lambda result: str(result["record_id"]))
        write_evaluation(
            self._folder.evaluation(label),
            Evaluation.of(by_sample, self._gate),
            label=label,
            optimizer_step=numbers.optimizer_step,
            root=self._root,
        )
