"""The notebook of the documents runs as it is written, on less data and over fewer steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.builders.datasets import write_voc

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "examples" / "photographs.ipynb"
SETTINGS = ["training.effective_batch_size=2", "training.eval_every_steps=0"]
FEWER = {"STEPS": 1, "PICTURES": 1, "SETTINGS": SETTINGS}


@pytest.mark.req("U-1", "U-3")
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_notebook_goes_from_photographs_to_drawn_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    objects = [("RBC", 9, 7, 29, 19), ("WBC", 30, 20, 60, 44)]
    source = write_voc(tmp_path / "voc", {name: objects for name in ("a", "b", "c")})
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    first, *others = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells), "kept without outputs"

    names: dict[str, Any] = {}
    exec(compile(first, str(NOTEBOOK), "exec"), names)
    assert set(FEWER) <= set(names)
    names |= {**FEWER, "PHOTOGRAPHS": source}
    for cell in others:
        exec(compile(cell, str(NOTEBOOK), "exec"), names)

    said = capsys.readouterr().out
    assert "over 1 steps" in said
    assert "eval_rollout_f1" in said
    assert names["drawings"][0].is_file()
