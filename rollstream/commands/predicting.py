"""`rollstream predict`: what a model finds in pictures, as JSON Lines, COCO results and drawings.

It is an evaluation without ground truth: the same prompt, picture bounds, decoding and parser.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from broker_schemas.errors import DataError
from broker_schemas.method.adapter_folder import is_adapter
from broker_schemas.method.coordinates import pixels_from_bin
from broker_schemas.method.images import open_upright
from broker_schemas.method.model_folder import base_of, resolve_model_dir
from configs import RunConfig, load_config
from learner.checkpoints import latest_checkpoint
from rollstream.evaluation.evaluation import Evaluator
from rollstream.run_folder import RunFolder
from rollstream.show.drawing import Shape, draw_shapes
from rollstream.staged_folder import write_atomically

DEFAULT_NEW_TOKENS: Final = 1024
PICTURE_SUFFIXES: Final = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What was written: files, how many pictures and objects, and the pictures that could not be read."""

    files: tuple[Path, ...]
    num_images: int
    num_objects: int
    unreadable: tuple[str, ...]


def predict(
    model: str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    max_new_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Write what ``model`` finds in ``images`` (files or folders) to ``out`` and return what was written.

    ``model`` is a model folder, a checkpoint of a run, or a run's folder (its latest checkpoint); the run's
    prompts and bounds are used where there is one. Pictures are turned upright first. One that cannot be read
    is passed over. Raises DataError for no model, or no picture that can be read.
    """
    folder, resolved = _find_model(Path(model))
    out = Path(out)
    with tempfile.TemporaryDirectory(prefix="rollstream-predict-") as name:
        work = Path(name)
        lines, files, unreadable = _copy_upright(_picture_files([Path(image) for image in images]), work)
        if not lines:
            raise DataError(f"no picture can be read: {'; '.join(unreadable) or 'none was given'}")
        config = _config(work, folder, resolved, max_new_tokens)
        results = Evaluator(config).evaluate_folder(folder, progress=progress).results
        by_id = {str(result["sample_id"]): result for result in results}
        found = [
            _prediction(file, line, by_id[line["metadata"]["sample_id"]])
            for file, line in zip(files, lines, strict=True)
        ]
        drawn = [
            _draw(out / "pictures", work / line["images"][0], entry)
            for line, entry in zip(lines, found, strict=True)
        ]
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in found)
    write_atomically(out / "predictions.jsonl", text)
    results_text, images_text = _coco(found)
    write_atomically(out / "coco_results.json", results_text)
    write_atomically(out / "coco_images.json", images_text)
    written = (
        out / "predictions.jsonl",
        out / "coco_results.json",
        out / "coco_images.json",
        drawn[0].parent,
    )
    return Predictions(
        files=written,
        num_images=len(found),
        num_objects=sum(len(entry["objects"]) for entry in found),
        unreadable=tuple(unreadable),
    )


def _find_model(model: Path) -> tuple[Path, Path | None]:
    """Return the model folder, and the resolved configuration of the run that it belongs to."""
    run = RunFolder(model)
    if not (model / "config.json").is_file() and run.checkpoints_dir.is_dir():
        checkpoint = latest_checkpoint(run.checkpoints_dir)
        if checkpoint is None:
            raise DataError(f"{model}: a run without a checkpoint yet; give a model folder")
        return checkpoint, run.resolved_config if run.resolved_config.is_file() else None
    folder = model if is_adapter(model) else resolve_model_dir(model)
    own = RunFolder(folder.resolve().parent.parent).resolved_config
    return folder, own if own.is_file() else None


def _picture_files(images: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in images:
        inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in PICTURE_SUFFIXES]
        found += inside if path.is_dir() else [path]
    return found


def _copy_upright(files: Sequence[Path], work: Path) -> tuple[list[dict[str, Any]], list[Path], list[str]]:
    """Write each picture upright into ``work``; return data set lines, their files, what cannot be read."""
    lines: list[dict[str, Any]] = []
    readable: list[Path] = []
    unreadable: list[str] = []
    for number, file in enumerate(files):
        try:
            picture = open_upright(file)
        except DataError as exc:
            unreadable.append(str(exc))
            continue
        name = f"{number:06d}.png"
        picture.save(work / name)
        size = {"width": picture.width, "height": picture.height}
        lines.append({"images": [name], **size, "objects": [], "metadata": {"sample_id": name}})
        readable.append(file)
    (work / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return lines, readable, unreadable


def _config(work: Path, folder: Path, resolved: Path | None, max_new_tokens: int | None) -> RunConfig:
    """Return the run's configuration, or a plain one, over the pictures in ``work``."""
    jsonl = str(work / "images.jsonl")
    overrides = [f"data.train_jsonl={jsonl}", f"data.val_jsonl={jsonl}", "data.root=null"]
    # an adapter speaks and sees as its base does
    whole = base_of(folder) if is_adapter(folder) else folder
    overrides += [f"model.name_or_path={json.dumps(str(whole))}", "model.config=null"]
    if max_new_tokens is not None:
        overrides.append(f"custom.extra.rollout_matching.max_new_tokens={max_new_tokens}")
        overrides.append(f"training.global_max_length={max_new_tokens + (1 << 16)}")
    if resolved is not None:
        return load_config(
            resolved, [*overrides, "evaluation.num_samples=null", "data.skip_untrainable=false"]
        )
    plain = {
        "run": {"name": "predict"},
        "data": {"train_jsonl": jsonl, "val_jsonl": jsonl},
        "model": {"name_or_path": str(whole)},
        "custom": {
            "trainer_variant": "stage2_ab_training",
            "extra": {"rollout_matching": {"max_new_tokens": max_new_tokens or DEFAULT_NEW_TOKENS}},
        },
        "stage2_ab": {"schedule": {"b_ratio": 0}},
        "training": {"effective_batch_size": 1, "global_max_length": 1 << 17, "max_steps": 1},
    }
    path = work / "predict.yaml"
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return load_config(path)


def _prediction(file: Path, line: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return one line of the predictions: objects in bins and in pixels of the upright picture."""
    width, height = line["width"], line["height"]
    objects = []
    for item in result["predictions"]:
        geometry = "bbox_2d" if "bbox_2d" in item else "poly"
        pixels = [
            round(pixels_from_bin(value, height if index % 2 else width), 2)
            for index, value in enumerate(item[geometry])
        ]
        score = item.get("logprob_score")
        objects.append(
            {
                "desc": item["desc"],
                geometry: list(item[geometry]),
                "pixels": pixels,
                "score": score if score is not None else item["score"],
            }
        )
    return {
        "image": str(file),
        "width": width,
        "height": height,
        "objects": objects,
        "is_invalid": bool(result["is_invalid_rollout"]),
        "truncated": bool(result["truncated"]),
        "text": result["rollout_text"],
    }


def _coco(found: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Return COCO results (a list that pycocotools loads) and the images and categories they point to."""
    names = sorted({item["desc"] for entry in found for item in entry["objects"]})
    number_of = {name: number for number, name in enumerate(names, start=1)}
    results = []
    for image_id, entry in enumerate(found, start=1):
        for item in entry["objects"]:
            x, y = item["pixels"][0::2], item["pixels"][1::2]
            row: dict[str, Any] = {
                "image_id": image_id,
                "category_id": number_of[item["desc"]],
                "bbox": [min(x), min(y), round(max(x) - min(x), 2), round(max(y) - min(y), 2)],
                "score": item["score"],
            }
            results.append(row | ({"segmentation": [item["pixels"]]} if "poly" in item else {}))
    images = [
        {"id": number, "file_name": entry["image"], "width": entry["width"], "height": entry["height"]}
        for number, entry in enumerate(found, start=1)
    ]
    categories = [{"id": number, "name": name} for name, number in number_of.items()]
    context = {"images": images, "categories": categories, "annotations": []}
    return json.dumps(results), json.dumps(context, ensure_ascii=False)


def _draw(folder: Path, picture: Path, entry: dict[str, Any]) -> Path:
    """Draw what was found into ``folder``, named after picture and place among those given."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    shapes = [shape for item in entry["objects"] if (shape := Shape.from_map(item)) is not None]
    target = folder / f"{picture.stem}-{Path(entry['image']).stem}.png"
    with Image.open(picture) as stored:
        draw_shapes(stored, predictions=shapes).save(target)
    return target
