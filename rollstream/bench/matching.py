"""Measures the matcher's stages on one core: `rollstream bench matching`.

Owns the measurement; it calls the cores as the matcher does, and needs no broker and no model.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
from rich.console import Group
from rich.table import Table

from broker_schemas.method.payload import render_payload
from broker_schemas.records.records import GroundTruthObject, SegmentRecord
from configs.rollout_sections import RolloutMatchingSection
from consumers.matching import match_objects
from consumers.parsing import ParsedRollout, parse_rollout
from consumers.record_matching import MatcherTools
from consumers.segments import build_segment
from consumers.transport_targets import targets_of_pairs
from rollstream.bench.references.matching import reference_pairs, reference_target
from rollstream.models.tiny_tokenizer import make_tiny_tokenizer
from rollstream.wiring.match import match_settings, transport_settings

T = TypeVar("T")
Geometry = Literal["bbox_2d", "poly"]
Stage = Literal["parse", "match", "targets", "build"]
STAGES: tuple[Stage, ...] = ("parse", "match", "targets", "build")
GEOMETRIES: tuple[Geometry, ...] = ("bbox_2d", "poly")
OBJECT_COUNTS = (5, 14, 30, 100)
BUDGET_OBJECTS = 14
BUDGETS_MS: dict[Geometry, float] = {"bbox_2d": 0.25, "poly": 2.5}
NAMES: dict[Geometry, str] = {"bbox_2d": "boxes", "poly": "polygons"}
PROMPT_TOKENS = 300
JITTER_BINS = 6


@dataclass(frozen=True, kw_only=True)
class MatchingRow:
    """One kind of rollout; times are medians for one rollout in milliseconds, on one core."""

    geometry: Geometry
    num_objects: int
    num_tokens: float
    """Mean length of the response."""
    parse_ms: float
    match_ms: float
    targets_ms: float
    build_ms: float
    reference_match_ms: float
    reference_targets_ms: float
    agreement: float
    """Share of rollouts whose pairs equal those of the reference."""

    @property
    def total_ms(self) -> float:
        return self.parse_ms + self.match_ms + self.targets_ms + self.build_ms

    @property
    def rollouts_per_second(self) -> float:
        return 1000.0 / self.total_ms

    @property
    def shares(self) -> dict[str, float]:
        """Share of each stage in the time of a rollout; they add up to 1."""
        return {stage: getattr(self, f"{stage}_ms") / self.total_ms for stage in STAGES}

    @property
    def speedup(self) -> float:
        """Reference over ours, for matching and targets together."""
        reference = self.reference_match_ms + self.reference_targets_ms
        return reference / (self.match_ms + self.targets_ms)

    def to_json(self) -> dict[str, Any]:
        derived = {"rollouts_per_second": self.rollouts_per_second, "shares": self.shares}
        return {**asdict(self), **derived, "speedup": self.speedup}


@dataclass(frozen=True, kw_only=True)
class MatchingBenchReport:
    """Everything one run of the benchmark measured."""

    seed: int
    num_rollouts: int
    rows: tuple[MatchingRow, ...]

    def measured_ms(self, geometry: Geometry) -> float:
        """Parse, match and targets of 14 objects, as measured."""
        (row,) = (r for r in self.rows if (r.geometry, r.num_objects) == (geometry, BUDGET_OBJECTS))
        return row.parse_ms + row.match_ms + row.targets_ms

    @property
    def is_within_budget(self) -> bool:
        return all(self.measured_ms(geometry) <= limit_ms for geometry, limit_ms in BUDGETS_MS.items())

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts and lists."""
        return {
            "seed": self.seed,
            "num_rollouts": self.num_rollouts,
            "rows": [row.to_json() for row in self.rows],
            "budgets": {
                NAMES[geometry]: {
                    "measured_ms": self.measured_ms(geometry),
                    "limit_ms": limit_ms,
                    "is_met": self.measured_ms(geometry) <= limit_ms,
                }
                for geometry, limit_ms in BUDGETS_MS.items()
            },
        }

    def render(self) -> Group:
        """Return the table of stages and the budgets for a rich console."""
        lines = []
        for geometry, limit_ms in BUDGETS_MS.items():
            measured_ms = self.measured_ms(geometry)
            met = "met" if measured_ms <= limit_ms else "NOT met"
            what = f"parse + match + targets of {BUDGET_OBJECTS} {NAMES[geometry]}"
            lines.append(f"{what}: {measured_ms:.2f} ms, limit {limit_ms:g}: {met}")
        return Group(_table(self), *lines)


def run_matching_bench(seed: int = 0, quick: bool = False) -> MatchingBenchReport:
    """Measure every stage at 5, 14, 30 and 100 objects, boxes and polygons; `quick` takes fewer rollouts.

    Rollouts repeat nine in ten ground-truth objects with up to 6 bins of jitter and invent one in twenty.
    Everything but the times is determined by the seed.
    """
    tokenizer = make_tiny_tokenizer(seed, num_payloads=400).backend_tokenizer
    method = RolloutMatchingSection()
    tools = MatcherTools.for_tokenizer(
        tokenizer,
        capacity=1 << 20,
        match_settings=match_settings(method),
        transport_settings=transport_settings(method),
    )
    num_rollouts = 2 if quick else 40
    rows = [
        _measure(sample_rollouts(geometry, num_objects, num_rollouts, tools, seed), geometry, tools)
        for geometry in GEOMETRIES
        for num_objects in OBJECT_COUNTS
    ]
    return MatchingBenchReport(seed=seed, num_rollouts=num_rollouts, rows=tuple(rows))


def sample_rollouts(
    geometry: Geometry, num_objects: int, num_rollouts: int, tools: MatcherTools, seed: int
) -> list[SegmentRecord]:
    """Return seeded rollout records with `num_objects` ground-truth objects of one geometry."""
    generator = random.Random(f"{seed}:{geometry}:{num_objects}")
    records = []
    for index in range(num_rollouts):
        truth = [_sample_object(geometry, generator) for _ in range(num_objects)]
        said = [_jittered(item, generator) for item in truth if generator.random() < 0.9]
        said += [_sample_object(geometry, generator) for _ in truth if generator.random() < 0.05]
        text = render_payload(said).text + "<|im_end|>"
        response = tools.tokenizer.encode(text, add_special_tokens=False).ids
        records.append(
            SegmentRecord(
                record_id=f"bench-{index}",
                policy_version=0,
                sample_id=str(index),
                task="bench",
                images=(),
                processor_fingerprint="",
                assistant_payload=tuple(truth),
                prompt_token_ids=np.zeros(PROMPT_TOKENS, np.int32),
                response_token_ids=np.asarray(response, np.int32),
            )
        )
    return records


def _sample_object(geometry: Geometry, generator: random.Random) -> GroundTruthObject:
    desc = generator.choice(("WBC", "red car", "café crème", "leaf", "traffic light"))
    x, y, radius = generator.randint(150, 850), generator.randint(150, 850), generator.randint(20, 140)
    if geometry == "bbox_2d":
        half = generator.randint(10, 140)
        return GroundTruthObject(
            desc=desc, geometry=geometry, bins=(x - radius, y - half, x + radius, y + half)
        )
    num_vertices = generator.randint(6, 16)
    bins = []
    for vertex in range(num_vertices):
        angle, reach = 2 * math.pi * vertex / num_vertices, radius * generator.uniform(0.7, 1.0)
        bins += [round(x + reach * math.cos(angle)), round(y + reach * math.sin(angle))]
    return GroundTruthObject(desc=desc, geometry=geometry, bins=tuple(bins))


def _jittered(item: GroundTruthObject, generator: random.Random) -> GroundTruthObject:
    moved = [value + generator.randint(-JITTER_BINS, JITTER_BINS) for value in item.bins]
    return replace(item, bins=tuple(min(max(value, 0), 999) for value in moved))


def _measure(records: Sequence[SegmentRecord], geometry: Geometry, tools: MatcherTools) -> MatchingRow:
    truths = [record.assistant_payload for record in records]
    parsed, parse_ms = _timed(
        lambda i: parse_rollout(records[i].response_token_ids, tools.tokenizer, tools.coord_vocab), records
    )
    said = [rollout.objects for rollout in parsed]
    matches, match_ms = _timed(lambda i: match_objects(said[i], truths[i], tools.match_settings), records)
    paired = [
        [(said[i][prediction], truths[i][index]) for prediction, index in matches[i].pairs]
        for i in range(len(records))
    ]
    targets, targets_ms = _timed(lambda i: targets_of_pairs(paired[i], tools.transport_settings), records)
    _, build_ms = _timed(
        lambda i: build_segment(records[i], parsed[i], matches[i], targets[i], tools.vocabulary), records
    )
    plain = [_plain_objects(rollout) for rollout in parsed]
    expected, reference_match_ms = _timed(lambda i: reference_pairs(plain[i], truths[i]), records, repeats=1)
    _, reference_targets_ms = _timed(
        lambda i: [reference_target(plain[i][p], truths[i][g]) for p, g in matches[i].pairs],
        records,
        repeats=1,
    )
    return MatchingRow(
        geometry=geometry,
        num_objects=len(truths[0]),
        num_tokens=statistics.fmean(len(record.response_token_ids) for record in records),
        parse_ms=parse_ms,
        match_ms=match_ms,
        targets_ms=targets_ms,
        build_ms=build_ms,
        reference_match_ms=reference_match_ms,
        reference_targets_ms=reference_targets_ms,
        agreement=statistics.fmean(
            list(match.pairs) == pairs for match, pairs in zip(matches, expected, strict=True)
        ),
    )


def _plain_objects(rollout: ParsedRollout) -> list[GroundTruthObject]:
    return [
        GroundTruthObject(desc=item.desc, geometry=item.geometry, bins=item.bins) for item in rollout.objects
    ]


def _timed(
    work: Callable[[int], T], records: Sequence[SegmentRecord], *, repeats: int = 3
) -> tuple[list[T], float]:
    """Do the work for every record; return the results and the median of each record's best time in ms."""
    results, times_ms = [], []
    for index in range(len(records)):
        best = math.inf
        for _ in range(repeats):
            started = time.perf_counter()
            result = work(index)
            best = min(best, (time.perf_counter() - started) * 1000)
        results.append(result)
        times_ms.append(best)
    return results, statistics.median(times_ms)


def _table(report: MatchingBenchReport) -> Table:
    title = f"ms a rollout; {report.num_rollouts} rollouts a row (seed {report.seed}), one core"
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    for heading in ("shapes", "objects", "per s", *STAGES):
        table.add_column(heading, justify="left" if heading == "shapes" else "right", no_wrap=True)
    for heading in ("ref", "faster", "same"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        stages = [f"{getattr(row, f'{stage}_ms'):.2f}" for stage in STAGES]
        table.add_row(
            "boxes" if row.geometry == "bbox_2d" else "poly",
            str(row.num_objects),
            f"{row.rollouts_per_second:,.0f}",
            *stages,
            f"{row.reference_match_ms + row.reference_targets_ms:.1f}",
            f"{row.speedup:.0f}x",
            f"{row.agreement:.0%}",
            end_section=row.num_objects == OBJECT_COUNTS[-1],
        )
    return table
