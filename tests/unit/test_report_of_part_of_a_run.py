"""The report of a folder that never was to hold all that a run may write."""

from __future__ import annotations

import json
from pathlib import Path

from rollstream.run_folder import RunFolder
from rollstream.show.report import build_report
from tests.builders.run_folders import make_config, make_evaluation, make_example, make_image, make_run_folder


def test_a_run_of_ground_truth_alone_is_not_said_to_lack_a_queue(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path, num_steps=4, num_samples=3)
    config = make_config(stage2_ab={"schedule": {"b_ratio": "0"}})
    folder.resolved_config.write_text(json.dumps(config), encoding="utf-8")
    for path in (folder.stack_samples, folder.audit):
        path.unlink()

    assert build_report(folder).missing == ()

    folder.audit.write_bytes(b"\xff")
    assert [item.split(":")[0] for item in build_report(folder).missing] == [str(folder.audit)]


def test_a_folder_that_an_evaluation_alone_made_has_a_report(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "only")
    folder.path.mkdir()
    evaluation = make_evaluation("start", [make_example(make_image(tmp_path / "a.png"))])
    folder.evaluation("start").write_text(json.dumps(evaluation), encoding="utf-8")

    data = build_report(folder.path)

    assert [item.label for item in data.evaluations] == ["start"]
    assert any("train_log.jsonl" in item for item in data.missing)
