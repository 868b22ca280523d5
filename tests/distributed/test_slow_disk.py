"""L-6: a publication or checkpoint that takes longer than every deadline ends no run of two ranks."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rollstream.run_folder import read_json_lines
from tests.builders.learner_fakes import FakeBroker
from tests.builders.learner_runs import run_one, settings_for
from tests.distributed.rank_processes import meet, run_ranks

STALL_TIMEOUT_S = 4.0


def _slow(rank: int, folder: Path) -> None:
    def take_long(policy_version: int, weights_path: str) -> None:
        if policy_version == 1:
            time.sleep(2 * STALL_TIMEOUT_S)

    ranks = meet(folder, "slow", rank, stall_timeout_s=STALL_TIMEOUT_S)
    settings = settings_for(folder, "slow", stall_timeout_s=60.0, max_steps=3)
    run_one(ranks, settings, FakeBroker(2), sync_servers=take_long)
    ranks.close()


@pytest.mark.slow
@pytest.mark.req("L-6")
def test_a_publication_longer_than_the_deadline_ends_no_run(tmp_path: Path) -> None:
    assert run_ranks(_slow, tmp_path) == [0, 0]
    assert len(read_json_lines(tmp_path / "slow" / "train_log.jsonl")) == 3
