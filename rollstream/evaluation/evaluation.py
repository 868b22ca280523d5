"""Evaluation: greedy rollouts on validation images by a producer's backend, judged by the matcher's core.

Records go from one to the other, as in the stack; nothing is packed or trained on [P-12].
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from broker_schemas.broker.rollout_requests import RolloutRequest
from broker_schemas.errors import ConfigError, DataError
from broker_schemas.method.adapter_folder import is_adapter
from broker_schemas.method.dataset import Sample
from broker_schemas.method.model_folder import load_policy
from broker_schemas.records.records import SegmentRecord
from configs import RunConfig
from consumers.evaluation_metrics import class_numbers, evaluation_metrics
from consumers.record_matching import MatcherTools, match_record
from producers.hf_backend import HfBackend, HfBackendSettings
from producers.record_building import build_records
from rollstream.wiring import access
from rollstream.wiring.match import matcher_tools
from rollstream.wiring.produce import decoding_settings
from rollstream.wiring.trainable import read_samples

Progress = Callable[[int, int], None]
EVALUATION_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics by the keys of ROLLOUT_MATCHING section 10, what each image gave, and the numbers by class.

    ``gate`` is the IoU at which the run matches.
    """

    metrics: dict[str, float]
    results: tuple[dict[str, Any], ...]
    classes: dict[str, dict[str, float]]
    gate: float

    @classmethod
    def of(cls, results: Sequence[dict[str, Any]], gate: float) -> Evaluation:
        """Work the numbers of ``results`` out."""
        return cls(
            metrics=evaluation_metrics(results),
            results=tuple(results),
            classes=class_numbers(results),
            gate=gate,
        )


class Evaluator:
    """Evaluates models on one data set with the settings of one run."""

    def __init__(
        self, config: RunConfig, *, num_samples: int | None = None, companions: Path | None = None
    ) -> None:
        if config.data.val_jsonl is None:
            raise ConfigError("data.val_jsonl: not set, expected the validation set to evaluate on")
        self._config = config
        folder = companions or access.model_dir(config)
        limit = num_samples or config.evaluation.num_samples
        self._samples: Sequence[Sample] = read_samples(config, config.data.val_jsonl)[:limit]
        self._prompts = access.prompt_builder(config, folder)
        self._images = access.image_processor(config, folder, config.data.val_jsonl)
        self._tools: MatcherTools = matcher_tools(config, folder)
        self._decoding = replace(decoding_settings(config), temperature=0.0, top_p=1.0, top_k=-1)

    def evaluate(self, model: Any, *, progress: Progress | None = None) -> Evaluation:
        """Return the evaluation of ``model`` in memory; it is left in the mode it was in."""
        was_training = model.training
        model.eval()
        try:
            device = str(next(model.parameters()).device)
            settings = HfBackendSettings(
                decoding=self._decoding,
                decode_batch_size=EVALUATION_BATCH,
                device=device,
                dtype=self._config.rollout_dtype,
            )
            backend = HfBackend(self._prompts, self._images, settings, model)
            results: list[dict[str, Any]] = []
            for start in range(0, len(self._samples), EVALUATION_BATCH):
                results += self._evaluate_batch(backend, start)
                if progress is not None:
                    progress(len(results), len(self._samples))
        finally:
            model.train(was_training)
        return Evaluation.of(results, self._config.rollout_matching.maskiou_gate)

    def evaluate_folder(self, folder: Path, *, progress: Progress | None = None) -> Evaluation:
        """Return the evaluation of a model folder; raises DataError."""
        device = (
            f"cuda:{self._config.devices.rollout_gpus[0]}" if self._config.devices.rollout_gpus else "cpu"
        )
        base = access.model_dir(self._config) if is_adapter(folder) else None
        model = load_policy(folder, self._config.rollout_dtype, base=base).to(device)
        return self.evaluate(model, progress=progress)

    def _evaluate_batch(self, backend: HfBackend, start: int) -> list[dict[str, Any]]:
        samples = self._samples[start : start + EVALUATION_BATCH]
        request = RolloutRequest(
            request_id=f"evaluation-{start}",
            samples=tuple((start + place, 0) for place in range(len(samples))),
            policy_version=0,
            purpose="evaluation",
        )
        records = build_records(
            request,
            samples,
            backend.generate(samples, [0] * len(samples)),
            processor_fingerprint=backend.processor_fingerprint,
            producer="evaluation",
            generated_at_ms=0,
            generation_ms=0,
        )
        return [self._judge(record) for record in records]

    def _judge(self, record: SegmentRecord) -> dict[str, Any]:
        outcome = match_record(record, self._tools)
        if outcome.evaluation is None:
            detail = outcome.rejection.detail if outcome.rejection else "no result"
            raise DataError(f"evaluation of {record.sample_id}: {detail}")
        return outcome.evaluation.to_body()


def write_evaluation(
    path: Path, evaluation: Evaluation, *, label: str, optimizer_step: int, root: Path, num_examples: int = 3
) -> None:
    """Write metrics and the first examples to ``path``, whole or not at all."""
    body = {
        "label": label,
        "optimizer_step": optimizer_step,
        "metrics": evaluation.metrics,
        "maskiou_gate": evaluation.gate,
        "classes": evaluation.classes,
        "examples": [_example(result, root) for result in evaluation.results[:num_examples]],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(body, ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(partial, path)


def _example(result: dict[str, Any], root: Path) -> dict[str, Any]:
    image = result["image"]
    return {
        "sample_id": result["sample_id"],
        "image": image["path"],
        "image_path": str((root / image["path"]).resolve()),
        "width": image["width"],
        "height": image["height"],
        "ground_truth": result["ground_truth"],
        "predictions": result["predictions"],
        "rollout_text": result["rollout_text"],
        "is_invalid": result["is_invalid_rollout"],
        "truncated": result["truncated"],
    }
