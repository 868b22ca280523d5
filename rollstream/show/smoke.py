"""`rollstream smoke`: a deterministic look at the method: greedy rollouts of a few samples, matched.

Leaves the resolved configuration, the counters and worked examples in the run folder [M-14].
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from broker_schemas.broker.rollout_requests import RolloutRequest
from broker_schemas.errors import DataError
from broker_schemas.method.dataset import Sample
from broker_schemas.method.images import open_image
from broker_schemas.method.model_folder import load_policy
from broker_schemas.method.sampling import rollout_seed, sample_at
from broker_schemas.records.records import MatchedSegment, SegmentRecord
from configs import RunConfig, show
from consumers.record_matching import MatcherTools, match_record, match_rollout
from consumers.token_bytes import token_bytes_of
from producers.hf_backend import HfBackend, HfBackendSettings
from producers.record_building import build_records
from rollstream.run_folder import RunFolder
from rollstream.show.inspect_view import draw_inspection, render_inspection
from rollstream.show.inspecting import inspection_of
from rollstream.staged_folder import write_atomically
from rollstream.wiring import access
from rollstream.wiring.match import matcher_tools
from rollstream.wiring.produce import decoding_settings
from rollstream.wiring.trainable import read_samples

EXAMPLE_COLUMNS = 110


@dataclass(frozen=True, kw_only=True)
class SmokeResult:
    """Where the artefacts are, and the counters of M-12 summed over all rollouts."""

    folder: Path
    counters: dict[str, int]
    rejections: dict[str, int]


def run_smoke(config: RunConfig, *, num_samples: int, num_examples: int = 3) -> SmokeResult:
    """Generate greedily for the first samples of the run's order, match them and write the artefacts.

    The same configuration gives the same files. Raises ConfigError, DataError.
    """
    folder = access.run_folder(config).smoke_dir
    model_dir = access.model_dir(config)
    tools = matcher_tools(config, model_dir)
    samples, records = _rollouts(config, model_dir, num_samples)
    counters: Counter[str] = Counter()
    rejections: Counter[str] = Counter()
    segments: list[tuple[Sample, SegmentRecord, MatchedSegment]] = []
    for sample, record in zip(samples, records, strict=True):
        outcome = match_record(record, tools)
        counters.update(outcome.counters)
        if outcome.segment is not None:
            segments.append((sample, record, outcome.segment))
        elif outcome.rejection is not None:
            rejections[outcome.rejection.reason] += 1
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(RunFolder(folder).resolved_config, show.resolved_yaml(config))
    summary = {"rollouts": len(records), "counters": dict(sorted(counters.items()))}
    summary["rejected"] = dict(sorted(rejections.items()))
    write_atomically(folder / "counters.json", json.dumps(summary, indent=1) + "\n")
    for number, (sample, record, segment) in enumerate(segments[:num_examples]):
        _write_example(folder / f"example-{number}", sample, record, segment, tools)
    return SmokeResult(folder=folder, counters=dict(counters), rejections=dict(rejections))


def _rollouts(
    config: RunConfig, model_dir: Path, num_samples: int
) -> tuple[Sequence[Sample], list[SegmentRecord]]:
    pool = read_samples(config, config.data.train_jsonl)
    if not 1 <= num_samples <= len(pool):
        raise DataError(
            f"smoke: got {num_samples} samples, expected 1 to the {len(pool)} of the training set"
        )
    seed = config.run.seed
    places = [sample_at(position, len(pool), seed) for position in range(num_samples)]
    samples = [pool[place] for place in places]
    seeds = [rollout_seed(position, seed) for position in range(num_samples)]
    greedy = replace(decoding_settings(config), temperature=0.0, top_p=1.0, top_k=-1)
    settings = HfBackendSettings(
        decoding=greedy,
        decode_batch_size=config.rollout_matching.decode_batch_size,
        dtype=config.rollout_dtype,
    )
    images = access.image_processor(config, model_dir, config.data.train_jsonl)
    model: Any = load_policy(model_dir, config.rollout_dtype)
    backend = HfBackend(access.prompt_builder(config, model_dir), images, settings, model)
    request = RolloutRequest(
        request_id=f"{config.run.name}-smoke",
        samples=tuple(zip(places, seeds, strict=True)),
        policy_version=0,
    )
    generations = backend.generate(samples, seeds)
    records = build_records(
        request,
        samples,
        generations,
        processor_fingerprint=backend.processor_fingerprint,
        producer="smoke",
        generated_at_ms=0,
        generation_ms=0,
    )
    return samples, records


def _write_example(
    path: Path, sample: Sample, record: SegmentRecord, segment: MatchedSegment, tools: MatcherTools
) -> None:
    """Write the rollout as text, and as a picture where it has an image."""
    inspection = inspection_of(segment, match_rollout(record, tools))
    table = token_bytes_of(tools.tokenizer)
    text = io.StringIO()
    console = Console(file=text, width=EXAMPLE_COLUMNS, force_terminal=False, color_system=None)
    console.print(render_inspection(inspection, lambda token_id: str(table.text([token_id]))))
    write_atomically(path.with_suffix(".txt"), text.getvalue())
    if sample.image_files:
        draw_inspection(inspection, open_image(sample.image_files[0])).save(path.with_suffix(".png"))
