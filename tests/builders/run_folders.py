"""Builders of run folders as a stack leaves them: valid by default, seeded, with all that a report reads."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

from broker_schemas.method.coordinates import coordinate_token
from rollstream.run_folder import RunFolder

START_MS = 1_790_000_000_000
B_RATIO = "0.4"
CLASSES = ("digit three", "digit seven", "digit eight")


def make_config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "run": {"name": "scenes-demo", "output_dir": "runs", "seed": 7},
        "data": {"train_jsonl": "data/train.jsonl", "val_jsonl": "data/val.jsonl", "root": None},
        "model": {"name_or_path": "assets/tiny-warm", "dtype": "float32"},
        "custom": {"trainer_variant": "stage2_async"},
        "stage2_ab": {"schedule": {"b_ratio": B_RATIO}},
        "stage2_async": {"queue_limit": 8, "prefetch_target_packs": 4, "version_window": 2},
        "training": {"max_steps": 60},
    }
    return config | changes


def make_step(optimizer_step: int = 12, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "optimizer_step": optimizer_step,
        "kind": "B",
        "reason": "claimed",
        "loss": 1.25,
        "loss_ce": 0.5,
        "loss_coord": 0.75,
        "loss_coord_prefix": 0.5,
        "loss_coord_tail": 0.25,
        "grad_norm": 1.5,
        "learning_rate": 1e-4,
        "num_segments": 16,
        "num_tokens": 3200,
        "num_packs": 4,
        "policy_version": optimizer_step,
        "lag_claimed_mean": 0.5,
        "lag_claimed_max": 1,
        "fill": 0.9,
        "wait_s": 0.25,
        "busy_s": 2.25,
        "step_s": 2.5,
        "time_ms": START_MS + 2500 * optimizer_step,
    }
    return row | changes


def make_sample(second: int = 30, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "time_ms": START_MS + 1000 * second,
        "ready_depth": [3, 4],
        "segments_waiting": 2,
        "matched_waiting": 5,
        "in_flight": 8,
        "policy_version": 12,
        "optimizer_step": 12,
        "requested": 208,
        "pushed": 200,
        "matched": 198,
        "packed_segments": 190,
        "trained_segments": 160,
        "dropped": {"stale_on_claim": 4},
        "rejected": {},
        "duplicates": 0,
        "lag_generated_mean": 0.4,
        "demand_advice": "",
        "broker_bytes": 2_400_000,
        "roles": [
            {"role": "dispatcher", "index": 0, "state": "running", "pid": 101, "restarts": 0},
            {"role": "producer", "index": 0, "state": "running", "pid": 102, "restarts": 0},
            {"role": "producer", "index": 1, "state": "running", "pid": 103, "restarts": 1},
            {"role": "matcher", "index": 0, "state": "running", "pid": 104, "restarts": 0},
            {"role": "packer", "index": 0, "state": "running", "pid": 105, "restarts": 0},
            {"role": "learner", "index": 0, "state": "running", "pid": 106, "restarts": 0},
        ],
    }
    return row | changes


def make_steps(num_steps: int = 60, *, seed: int = 3) -> list[dict[str, Any]]:
    """Return a course of training that looks like one: falling losses, B when due and the queue serves it."""
    rng = random.Random(seed)
    rows = []
    for step in range(num_steps):
        due = math.floor((step + 1) * 0.4 + 1e-9) > math.floor(step * 0.4 + 1e-9)
        short = due and (step < 3 or rng.random() < 0.06)
        kind = "B" if due and not short else "A"
        busy_s = rng.uniform(1.7, 2.3) * (1.2 if kind == "B" else 1.0)
        wait_s = rng.expovariate(6.0) if kind == "B" else rng.uniform(0.01, 0.05)
        level = (2.1 if kind == "B" else 1.4) * math.exp(-step / 55) + 0.35
        changes: dict[str, Any] = {
            "kind": kind,
            "reason": "claimed" if kind == "B" else "queue_short" if short else "schedule",
            "loss": level * rng.uniform(0.85, 1.15),
            "wait_s": wait_s,
            "busy_s": busy_s,
            "step_s": wait_s + busy_s,
            "num_tokens": rng.randint(2900, 3700),
            "lag_claimed_mean": rng.choice((0.0, 0.5, 0.75, 1.0, 1.5)),
            "lag_claimed_max": rng.choice((1, 1, 2)),
            "fill": rng.uniform(0.86, 0.99),
        }
        if kind == "B":
            changes |= {
                "rollout/valid_objects": rng.randint(20, 36),
                "rollout/dropped_bbox_invalid": rng.choice((0, 1, 3)),
                "rollout/dropped_wrong_arity": rng.choice((0, 0, 1)),
                "rollout/truncated": rng.choice((0, 0, 1)),
                "rollout/matched": rng.randint(14, 20),
                "rollout/unmatched_appended": rng.randint(4, 12),
                "rollout/gating_rejections": rng.randint(0, 6),
            }
        rows.append(make_step(step, **changes))
    return rows


def make_samples(num_samples: int = 150, *, seed: int = 5) -> list[dict[str, Any]]:
    """Return one sample a second of a stack that fills its queues and then serves them."""
    rng = random.Random(seed)
    rows, pushed, depths, stale = [], 0, [0, 0], 0
    for second in range(num_samples):
        pushed += rng.randint(2, 5)
        depths = [min(max(depth + rng.choice((-1, 0, 0, 1)) + (second < 6), 0), 8) for depth in depths]
        stale += rng.random() < 0.1
        rows.append(
            make_sample(
                second,
                ready_depth=list(depths),
                policy_version=second * 60 // num_samples,
                optimizer_step=second * 60 // num_samples,
                requested=pushed + 8,
                pushed=pushed,
                matched=max(pushed - 2, 0),
                packed_segments=max(pushed - 9, 0),
                trained_segments=max(pushed - 40, 0),
                dropped={"stale_on_claim": stale, "drop_oldest": stale // 3},
                rejected={"malformed": 1} if second > 80 else {},
                lag_generated_mean=0.3 + 0.25 * math.sin(second / 14) ** 2,
                broker_bytes=1_500_000 + 9000 * second,
            )
        )
    return rows


def box_text(objects: list[dict[str, Any]]) -> str:
    """Return the payload text of boxes."""
    entries = []
    for index, item in enumerate(objects):
        tokens = ", ".join(f'"{coordinate_token(value)}"' for value in item["bbox_2d"])
        entries.append(f'"object_{index + 1}": {{"desc": "{item["desc"]}", "bbox_2d": [{tokens}]}}')
    return "{" + ", ".join(entries) + "}"


def make_example(
    image_path: Path, *, sample_id: str = "val-0", spread: int = 0, seed: int = 1
) -> dict[str, Any]:
    """Return one example whose predictions lie up to ``spread`` bins beside the ground truth."""
    rng = random.Random(seed)
    boxes = [[80, 110, 380, 520], [520, 330, 880, 760]]
    truth: list[dict[str, Any]] = [
        {"desc": CLASSES[index], "bbox_2d": box} for index, box in enumerate(boxes)
    ]
    wrote = [
        {**item, "bbox_2d": [min(max(v + rng.randint(-spread, spread), 0), 999) for v in item["bbox_2d"]]}
        for item in truth
    ]
    truth.append({"desc": CLASSES[2], "poly": [150, 640, 320, 610, 410, 760, 330, 930, 170, 900]})
    if spread < 40:
        wrote.append({"desc": CLASSES[2], "poly": [160, 650, 320, 620, 400, 750, 320, 920, 170, 890]})
    return {
        "sample_id": sample_id,
        "image": image_path.name,
        "image_path": str(image_path),
        "width": 128,
        "height": 128,
        "ground_truth": truth,
        "predictions": wrote,
        "rollout_text": box_text([item for item in wrote if "bbox_2d" in item]),
        "is_invalid": False,
        "truncated": spread > 60,
    }


def make_evaluation(label: str, examples: list[dict[str, Any]], *, f1: float = 0.61) -> dict[str, Any]:
    return {
        "label": label,
        "optimizer_step": 0 if label == "before" else 60,
        "metrics": {
            "eval_rollout_precision": f1 + 0.03,
            "eval_rollout_recall": f1 - 0.03,
            "eval_rollout_f1": f1,
            "eval_rollout_f1_class": f1 - 0.1,
            "eval_rollout_f1_50": f1 - 0.15,
            "eval_rollout_f1_class_50": f1 - 0.2,
            "eval_rollout_label_accuracy": 0.5,
            "eval_rollout_map_50": f1 - 0.1,
            "eval_rollout_pred_objects": 118,
            "eval_rollout_gt_objects": 126,
            "eval_rollout_matched": 75,
            "eval_rollout_fp": 43,
            "eval_rollout_fn": 51,
            "eval_rollout_parse_truncated_rate": 0.031,
            "eval_rollout_map": f1 - 0.2,
        },
        "maskiou_gate": 0.3,
        "classes": {
            "ring": {"gt_objects": 80, "pred_objects": 70, "map": 0.3, "map_50": f1},
            "dot": {"gt_objects": 46, "pred_objects": 48, "map": 0.2, "map_50": 0.31},
        },
        "examples": examples,
    }


def make_audit() -> dict[str, Any]:
    return {
        "requested": 520,
        "trained": 470,
        "dropped": {"stale_on_claim": 12, "drop_oldest": 4},
        "rejected": {"malformed": 1},
        "in_flight": 33,
        "balanced": True,
    }


def make_image(path: Path, *, size: tuple[int, int] = (128, 128), seed: int = 0) -> Path:
    """Write a grey picture with noise and return its path."""
    rng = random.Random(seed)
    image = Image.new("L", size, 24)
    pen = ImageDraw.Draw(image)
    for _ in range(size[0] * 4):
        place = (rng.randrange(size[0]), rng.randrange(size[1]))
        pen.point(place, fill=rng.randint(20, 70))
    for x, y, w, h in ((0.09, 0.12, 0.28, 0.4), (0.53, 0.34, 0.34, 0.41), (0.16, 0.62, 0.24, 0.3)):
        pen.ellipse((x * size[0], y * size[1], (x + w) * size[0], (y + h) * size[1]), outline=210, width=6)
    image.save(path)
    return path


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run_folder(root: Path, *, num_steps: int = 60, num_samples: int = 150) -> RunFolder:
    """Write a whole run folder below ``root`` and return it."""
    folder = RunFolder(root / "scenes-demo")
    images = folder.path / "images"
    images.mkdir(parents=True)
    paths = [make_image(images / f"scene-{index}.png", seed=index) for index in range(4)]
    folder.resolved_config.write_text(yaml.safe_dump(make_config()), encoding="utf-8")
    write_json_lines(folder.train_log, make_steps(num_steps))
    write_json_lines(folder.stack_samples, make_samples(num_samples))
    for label, spread, f1 in (("before", 70, 0.612), ("after", 14, 0.784)):
        examples = [
            make_example(path, sample_id=f"val-{index}", spread=spread, seed=index)
            for index, path in enumerate(paths)
        ]
        content = make_evaluation(label, examples, f1=f1)
        folder.evaluation(label).write_text(json.dumps(content), encoding="utf-8")
    folder.audit.write_text(json.dumps(make_audit()), encoding="utf-8")
    return folder
