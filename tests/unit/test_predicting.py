"""`predict` writes and draws what a model finds in new pictures; `data show` draws what is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from pycocotools.coco import COCO
from typer.testing import CliRunner

from broker_schemas.errors import DataError
from broker_schemas.method.images import open_upright
from rollstream.commands.predicting import predict
from rollstream.commands.program import app
from rollstream.commands.showing_data import show_samples
from rollstream.models.shipped import SHIPPED_MODEL
from tests.builders.datasets import BOX, POLYGON, dataset_line, write_jsonl, write_picture


@pytest.mark.req("D-4")
def test_predictions_are_written_as_lines_coco_results_and_pictures(tmp_path: Path) -> None:
    write_picture(tmp_path / "new" / "one.png", 128, 128)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "new" / "turned.jpg", exif=exif)
    torn = tmp_path / "torn.png"
    torn.write_text("no picture")
    seen: list[int] = []

    done = predict(
        SHIPPED_MODEL,
        [tmp_path / "new", torn],
        tmp_path / "out",
        max_new_tokens=120,
        progress=lambda count, total: seen.append(count),
    )

    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [(Path(line["image"]).name, line["width"], line["height"]) for line in lines] == [
        ("one.png", 128, 128),
        ("turned.jpg", 48, 64),
    ]
    assert (done.num_images, len(done.unreadable), seen[-1]) == (2, 1, 2)
    assert "torn.png" in done.unreadable[0]
    assert done.num_objects == sum(len(line["objects"]) for line in lines)
    truth = COCO(str(tmp_path / "out" / "coco_images.json"))
    results = json.loads((tmp_path / "out" / "coco_results.json").read_text())
    assert len(results) == done.num_objects
    if results:
        assert len(truth.loadRes(str(tmp_path / "out" / "coco_results.json")).anns) == done.num_objects
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 2
    with pytest.raises(DataError, match="no picture can be read"):
        predict(SHIPPED_MODEL, [torn], tmp_path / "none", max_new_tokens=8, progress=lambda *_: None)


def test_a_picture_is_opened_as_it_is_meant_to_be_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    stored = Image.new("RGB", (4, 2))
    stored.putpixel((3, 0), (255, 255, 255))
    stored.save(tmp_path / "turned.png", exif=exif)

    seen = open_upright(tmp_path / "turned.png")

    assert seen.size == (2, 4)
    assert seen.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.req("D-4")
def test_samples_are_drawn_by_seed_or_by_name(tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "one.png")
    lines = [
        dataset_line(objects=[BOX, POLYGON], metadata={"sample_id": f"a/{number}"}) for number in range(5)
    ]
    write_jsonl(tmp_path / "train.jsonl", lines)

    drawn = show_samples(tmp_path, tmp_path / "shown", num_samples=3, seed=1)
    words = ["data", "show", str(tmp_path), "--out", str(tmp_path / "named"), "--sample", "a/2"]
    named = CliRunner().invoke(app, words)

    assert len({path.name for path in drawn}) == 3
    with Image.open(drawn[0]) as picture:
        assert len(picture.getcolors(1 << 20) or []) > 2
    assert "drew 1 samples" in named.output
    assert (tmp_path / "named" / "a-2.png").is_file()
    with pytest.raises(DataError, match="no sample 'gone'"):
        show_samples(tmp_path, tmp_path / "shown", num_samples=3, seed=1, sample_ids=("gone",))
