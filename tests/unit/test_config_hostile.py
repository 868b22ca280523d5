"""Configurations that are made to cost time or memory: each is refused soon, with a report one can read."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from configs import ConfigError, load_config
from tests.builders.configs import write_file

VALID_TEXT = """\
data: {train_jsonl: train.jsonl}
custom: {trainer_variant: stage2_ab_training}
"""

HOSTILE_TEXTS = {
    "keys nobody knows": VALID_TEXT + "".join(f"learnin_rate_{number}: 1\n" for number in range(1_800)),
    "long keys nobody knows": VALID_TEXT + "".join(f"{'k' * 400}{number}: 1\n" for number in range(1_500)),
    "more keys than are read": VALID_TEXT + "".join(f"key_{number}: 1\n" for number in range(5_000)),
    "one key again and again": VALID_TEXT + "key: 1\n" * 1_500,
    "lists in lists": f"run: {'[' * 10_000}{']' * 10_000}\n",
    "lists that never end": f"run: {'[' * 10_000}\n",
    "maps in maps": f"run: {'{a: ' * 10_000}1{'}' * 10_000}\n",
    "dashes": "- " * 10_000 + "1\n",
    "a billion laughs": "a0: &a0 [x, x]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)),
    "an alias in itself": "run: &run [*run]\n",
}


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS)
def test_a_hostile_file_is_answered_soon_and_briefly(tmp_path: Path, text: str) -> None:
    path = write_file(tmp_path, text)
    started_s = time.process_time()

    with pytest.raises(ConfigError) as refused:
        load_config(path)

    assert time.process_time() - started_s < 2
    assert len(str(refused.value)) < 70_000
    assert len(str(refused.value).splitlines()) <= 102


def test_files_that_extend_each_other_without_end_are_refused(tmp_path: Path) -> None:
    for number in range(60):
        lines = "".join(f"key_{number}_{place}: 1\n" for place in range(200 * (number > 5)))
        write_file(tmp_path, f"extends: f{number + 1}.yaml\n{lines}", f"f{number}.yaml")

    with pytest.raises(ConfigError, match="more than 16 files or 2000 values extend each other"):
        load_config(tmp_path / "f0.yaml")


@pytest.mark.parametrize("text", ["run.seed=3", "run.name=[1, 2, {a: b}]", "a.b=3", "=", "run=[" + "[" * 40])
def test_overrides_without_end_are_answered_soon(tmp_path: Path, text: str) -> None:
    path, started_s = write_file(tmp_path, VALID_TEXT), time.process_time()

    with pytest.raises(ConfigError, match="overrides: got more than 500; write them into a file"):
        load_config(path, [text] * 2_000)

    assert time.process_time() - started_s < 2


def test_an_override_deeper_than_any_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not an override"):
        load_config(write_file(tmp_path, VALID_TEXT), ["a" + ".a" * 5_000 + "=1"])
