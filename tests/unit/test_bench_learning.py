"""The learning bench: arms, intervals, tables, and going on after a stop, with stacks of paper."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from broker_schemas.errors import ConfigError
from configs import RunConfig
from rollstream.bench import learning
from rollstream.bench.learning import LearningOptions, run_learning_bench
from rollstream.bench.learning_arms import VARIED, arms_of, cells_of, steps_for_tokens
from rollstream.bench.learning_numbers import CellResult, against, cell_result, estimate
from rollstream.bench.learning_report import learning_json, render_learning, render_learning_page
from rollstream.stack.running import StackOptions
from rollstream.wiring import access
from tests.builders.configs import PROJECT_ROOT

DEMO = PROJECT_ROOT / "configs" / "demo.yaml"
QUIET = Console(quiet=True)
TOKENS_OF_A, TOKENS_OF_B = 100, 150


@dataclass
class PaperStacks:
    """Runs that write a training log at once; AP50 is 0.4, 0.1 more with B steps, and a bit with the seed."""

    begun: list[str] = field(default_factory=list)
    judged_gates: set[float] = field(default_factory=set)
    statuses: dict[str, int] = field(default_factory=dict)
    fingerprint: str = "the first"

    def run(self, _path: Path, config: RunConfig, options: StackOptions) -> SimpleNamespace:
        self.begun.append(config.run.name)
        status = self.statuses.get(config.run.name, 0)
        folder = access.run_folder(config)
        folder.path.mkdir(parents=True, exist_ok=True)
        ratio = float(config.b_ratio)
        rows = [
            {"optimizer_step": step, "kind": kind, "num_tokens": tokens, "step_s": 0.5}
            for step in range(config.training.max_steps)
            for kind, tokens in [("B", TOKENS_OF_B) if step % 2 and ratio else ("A", TOKENS_OF_A)]
        ]
        folder.train_log.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return SimpleNamespace(exit_status=status, reason="stopped" if status else "")

    def judge(self, config: RunConfig, *, model: Path | None, **_rest: Any) -> SimpleNamespace:
        self.judged_gates.add(config.rollout_matching.maskiou_gate)
        has_b = '"B"' in access.run_folder(config).train_log.read_text("utf-8") if model is None else False
        score = 0.4 + 0.1 * has_b + 0.001 * config.run.seed
        numbers = {
            "map_50": score,
            "f1_class_50": 0.5,
            "f1_50": 0.6,
            "fn": 10.0 - 2 * has_b,
            "gt_objects": 40,
        }
        return SimpleNamespace(metrics={f"eval_rollout_{name}": value for name, value in numbers.items()})


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> PaperStacks:
    paper = PaperStacks()
    monkeypatch.setattr(learning, "run_stack", paper.run)
    monkeypatch.setattr(learning, "evaluate_run", paper.judge)
    monkeypatch.setattr(learning, "model_fingerprint", lambda _folder: paper.fingerprint)
    return paper


def options_in(folder: Path, **changed: Any) -> LearningOptions:
    return LearningOptions(config_path=DEMO, steps=4, output_dir=folder / "bench", **changed)


def test_a_bench_compares_equal_steps_and_equal_tokens_over_seeds(
    stacks: PaperStacks, tmp_path: Path
) -> None:
    outcome = run_learning_bench(options_in(tmp_path), QUIET)

    found = learning_json(outcome.bench)
    arms = {arm["arm"]: arm for arm in found["arms"]}
    assert outcome.exit_status == 0
    assert list(arms) == ["A", "A/B", "A, tokens of A/B"]
    assert len(stacks.begun) == len(set(stacks.begun)) == outcome.num_run == 9
    by_arm: dict[str, list[dict[str, int]]] = {}
    for cell in found["cells"]:
        by_arm.setdefault(cell["arm"], []).append(cell["result"])
    assert {row["num_steps"] for row in by_arm["A"] + by_arm["A/B"]} == {4}
    assert {row["num_tokens"] for row in by_arm["A/B"]} == {500}
    assert {(row["num_steps"], row["num_tokens"]) for row in by_arm["A, tokens of A/B"]} == {(5, 500)}
    gain = arms["A/B"]["above_a"]["map_50"]
    assert gain["mean"] == pytest.approx(0.1)
    # the seeds of both arms are paired, so what a seed adds to both is not noise
    assert gain["half_width"] == pytest.approx(0, abs=1e-9)
    assert arms["A/B"]["over_seeds"]["map_50"]["half_width"] > 0.002
    assert (tmp_path / "bench" / "learning.html").exists()
    assert json.loads((tmp_path / "bench" / "learning.json").read_text("utf-8")) == found


def test_a_stopped_bench_goes_on_with_what_is_missing(stacks: PaperStacks, tmp_path: Path) -> None:
    third = "bench-a-tokens-seed-17"
    stacks.statuses[third] = 130

    stopped = run_learning_bench(options_in(tmp_path, num_seeds=2), QUIET)
    stacks.statuses.clear()
    went_on = run_learning_bench(options_in(tmp_path, num_seeds=2), QUIET)
    again = run_learning_bench(options_in(tmp_path, num_seeds=2), QUIET)

    assert (stopped.exit_status, stopped.num_run) == (130, 2)
    assert (went_on.exit_status, went_on.num_run) == (0, 4)
    assert (again.exit_status, again.num_run) == (0, 0)
    assert stacks.begun.count(third) == 2
    assert len(stacks.begun) == 7
    assert learning_json(again.bench) == learning_json(went_on.bench)


def test_a_run_that_fails_is_told_and_does_not_stop_the_others(stacks: PaperStacks, tmp_path: Path) -> None:
    stacks.statuses["bench-ab-seed-17"] = 3

    outcome = run_learning_bench(options_in(tmp_path, num_seeds=2), QUIET)

    assert outcome.exit_status == 3
    assert dict(outcome.bench.failures) == {"ab-seed-17": "stopped"}
    # without A/B nobody knows how many tokens its seed's third run trains
    assert sorted(outcome.bench.results) == ["a-seed-17", "a-seed-18", "a-tokens-seed-18", "ab-seed-18"]
    assert "ab-seed-17: stopped" in render_learning_page(outcome.bench)


def test_results_of_other_settings_and_broken_ones_are_refused(stacks: PaperStacks, tmp_path: Path) -> None:
    run_learning_bench(options_in(tmp_path, num_seeds=1), QUIET)

    with pytest.raises(ConfigError, match="a-seed-17.json was measured with other settings; delete it"):
        run_learning_bench(
            options_in(tmp_path, num_seeds=1, overrides=("training.learning_rate=0.1",)), QUIET
        )

    result_file = tmp_path / "bench" / "cells" / "a-seed-17.json"
    kept = json.loads(result_file.read_text("utf-8"))
    result_file.write_text(json.dumps({**kept, "result": {"num_steps": 4}}), "utf-8")
    with pytest.raises(ConfigError, match="holds no result.*delete it"):
        run_learning_bench(options_in(tmp_path, num_seeds=1), QUIET)


def test_every_setting_of_interest_can_be_varied(stacks: PaperStacks, tmp_path: Path) -> None:
    varied = {
        "b_ratio": ["0.25"],
        "temperature": ["0.7"],
        "version_window": ["4"],
        "gate": ["0.5"],
        "duplicate_weight": ["0.1"],
        "transport": ["l2", "l1"],
    }
    assert varied.keys() == VARIED.keys()

    outcome = run_learning_bench(options_in(tmp_path, num_seeds=1, varied=varied), QUIET)

    assert outcome.num_run == 3 + 7
    assert [arm.title for arm in outcome.bench.arms][3:] == [
        *("A/B b_ratio 0.25", "A/B temperature 0.7", "A/B version_window 4", "A/B gate 0.5"),
        *("A/B duplicate_weight 0.1", "A/B transport l2", "A/B transport l1"),
    ]
    # one gate judges all, or the scores of runs trained with another could not be compared
    assert stacks.judged_gates == {0.3}


def test_a_bench_does_not_go_on_from_another_checkpoint(stacks: PaperStacks, tmp_path: Path) -> None:
    run_learning_bench(options_in(tmp_path, num_seeds=1), QUIET)
    stacks.fingerprint = "trained again since"

    with pytest.raises(ConfigError, match="began from another checkpoint"):
        run_learning_bench(options_in(tmp_path, num_seeds=2), QUIET)

    assert len(stacks.begun) == 3


@pytest.mark.parametrize(
    "changed,said",
    [
        (
            {"overrides": ("stage2_ab.schedule.b_ratio=0",)},
            "got no B steps.*--set stage2_ab.schedule.b_ratio",
        ),
        ({"overrides": ("data.val_jsonl=null",)}, "got no data.val_jsonl"),
        ({"varied": {"transport": ["l3"]}}, "A/B transport l3: .*l3"),
        ({"varied": {"gate": ["2"]}}, "A/B gate 2: .*maskiou_gate"),
        ({"varied": {"gate": ["0.5", "0.5"]}}, "A/B gate 0.5 more than once"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    stacks: PaperStacks, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        run_learning_bench(options_in(tmp_path, **changed), QUIET)

    assert stacks.begun == []


def test_tables_fit_80_columns(stacks: PaperStacks, tmp_path: Path) -> None:
    varied = {"version_window": ["4"], "duplicate_weight": ["0.05"]}
    outcome = run_learning_bench(options_in(tmp_path, num_seeds=2, varied=varied), QUIET)
    stream = io.StringIO()

    Console(width=80, file=stream, color_system=None).print(render_learning(outcome.bench))

    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "0.518 ±0.006" in text
    assert "+0.100 ±0.000*" in text
    assert "…" not in text


def test_intervals_are_students() -> None:
    found = estimate([0.4, 0.5, 0.6])

    assert found is not None
    assert found.half_width is not None
    assert found.mean == pytest.approx(0.5)
    assert found.half_width == pytest.approx(4.302653 * 0.1 / 3**0.5)
    assert found.is_apart_from_zero
    single = estimate([0.4])
    assert single is not None
    assert single.half_width is None
    assert not single.is_apart_from_zero
    assert estimate([]) is None


def test_differences_are_of_seeds_that_both_have() -> None:
    def result(score: float) -> CellResult:
        return cell_result([], {"eval_rollout_map_50": score, "eval_rollout_unheard_of": 1.0})

    own, baseline = (
        {1: result(0.5), 2: result(0.7), 3: result(0.9)},
        {2: result(0.4), 3: result(0.5), 4: result(0)},
    )

    found = against(own, baseline, "map_50")

    assert found is not None
    assert (found.num, found.mean) == (2, pytest.approx(0.35))
    assert against(own, {}, "map_50") is None
    assert result(0.5).numbers == {"map_50": 0.5}


def test_runs_of_a_seed_stand_together_and_have_names_of_their_own() -> None:
    cells = cells_of(arms_of({"b_ratio": ["0.2", "0.02"]}), first_seed=5, num_seeds=2)

    names = [cell.run_name("My Bench! with a name of great length") for cell in cells]

    assert [cell.seed for cell in cells] == [5] * 5 + [6] * 5
    assert len(set(names)) == 10
    assert all(name.startswith("my-bench-with-a-name-of-") and len(name) <= 64 for name in names)


def test_equal_tokens_need_some_tokens() -> None:
    assert steps_for_tokens(10, 1000, 1449) == 14
    assert steps_for_tokens(10, 1000, 1) == 1
    with pytest.raises(ValueError, match="got 0 tokens"):
        steps_for_tokens(10, 0, 500)
