"""Every process takes its own device: producers in turn, ranks by node [L-9]."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import ConfigError
from rollstream.stack.learning import check_one_node
from rollstream.wiring.learn import rank_device
from rollstream.wiring.produce import rollout_device
from tests.builders.configs import load_mapping, make_mapping, refusal

pytestmark = pytest.mark.req("L-9")


def test_producers_take_the_rollout_gpus_in_turn(tmp_path: Path) -> None:
    config = load_mapping(tmp_path, make_mapping(devices__rollout_gpus=[4, 6, 7]))

    devices = [rollout_device(config, index) for index in range(5)]

    assert devices == ["cuda:4", "cuda:6", "cuda:7", "cuda:4", "cuda:6"]
    assert rollout_device(load_mapping(tmp_path, make_mapping()), 3) == "cpu"


def test_ranks_of_two_nodes_take_the_learner_gpus_of_their_own(tmp_path: Path) -> None:
    config = load_mapping(
        tmp_path,
        make_mapping(devices__learner_gpus=[1, 3], devices__learner_world_size=4),
    )

    assert [str(rank_device(config, local_rank)) for local_rank in (0, 1)] == ["cuda:1", "cuda:3"]
    with pytest.raises(ConfigError, match="2 GPUs of this node for local rank 2.*nproc_per_node 2"):
        rank_device(config, 2)
    with pytest.raises(ConfigError, match="4 ranks for 2 GPUs a node.*each of 2 nodes"):
        check_one_node(config)


def test_nodes_have_the_same_number_of_gpus(tmp_path: Path) -> None:
    mapping = make_mapping(devices__learner_gpus=[0, 1], devices__learner_world_size=3)
    assert "names 2 GPUs, but devices.learner_world_size is 3" in refusal(tmp_path, mapping)
