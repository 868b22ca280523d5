"""A run trained from a real queue, then again from its archive alone: the same to the bit [Q-15]."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.matcher_door import MatcherDoor, MatchVerdict
from broker_schemas.broker.packer_door import PackerDoor, PlannedPack
from broker_schemas.client import SegmentSink
from broker_schemas.errors import ConfigError, DataError
from broker_schemas.records.packs import ReadyPack, StepClaim
from broker_schemas.records.records import MatchedSegment
from configs import RunConfig, load_config
from rollstream.datasets.scenes import make_scenes
from rollstream.history.archive import ArchiveWriter
from rollstream.history.archive_reading import read_archived_events
from rollstream.history.replay import ReplayOptions, check_changes, replay_run
from rollstream.history.replay_plan import repack
from rollstream.models.tiny_model import make_tiny_model
from rollstream.run_folder import RunFolder
from rollstream.wiring import access
from rollstream.wiring.learn import channel_a_source
from tests.builders.configs import make_mapping, write_file
from tests.builders.records import a_rollout

pytestmark = pytest.mark.timeout(400)  # several learners, on a machine that may be busy

NUM_STEPS, PACKS_PER_STEP = 4, 2


def write_run(folder: Path, run: str, redis_url: str) -> Path:
    """Make data and model of a run of one rank: A, B, A, B, two packs a step; return its configuration."""
    make_scenes(folder / "data", num_train=16, num_val=1)
    make_tiny_model(folder / "model")
    mapping = make_mapping(
        run__name=run,
        run__output_dir=str(folder),
        data__train_jsonl=str(folder / "data" / "train.jsonl"),
        data__val_jsonl=str(folder / "data" / "val.jsonl"),
        model__name_or_path=str(folder / "model"),
        model__image={"min_pixels": 16_384, "max_pixels": 16_384},
        training__effective_batch_size=4,
        training__per_device_train_batch_size=2,
        training__max_steps=NUM_STEPS,
        training__save_every_steps=2,
        stage2_async__sync_every_steps=2,
        stage2_async__prefetch_target_packs=2,
        devices__learner_world_size=1,
        broker__url=redis_url,
        metrics__base_port=0,
    )
    return write_file(folder, mapping)


def training_segments(config: RunConfig) -> list[MatchedSegment]:
    """Return real segments of the run's data, two for each pack of its B steps, as if they were matched.

    The image of the last one was deleted after its rollout.
    """
    folder = access.model_dir(config)
    source = channel_a_source(
        config,
        access.prompt_builder(config, folder),
        access.image_processor(config, folder, config.data.train_jsonl),
    )
    found: list[MatchedSegment] = []
    for step in range(NUM_STEPS // 2):
        for segment, _ in source.load_items(step, range(source.num_segments), 0):
            found.append(replace(segment, channel="B", record_id=f"b-{len(found)}"))
    gone = tuple(replace(image, path="images/gone.png") for image in found[-1].images)
    return [*found[:-1], replace(found[-1], images=gone)]


def fill_queue(broker: Broker, segments: list[MatchedSegment]) -> None:
    by_id = {segment.record_id: segment for segment in segments}
    SegmentSink(broker).push([a_rollout(name) for name in by_id])
    matcher, packer = MatcherDoor(broker, "m-0"), PackerDoor(broker)
    matcher.commit(
        [
            MatchVerdict(entry=entry, outcome="matched", segment=by_id[entry.record_id])
            for entry in matcher.read(count=100, block_ms=1)
        ],
        oldest_policy_version=0,
    )
    held = packer.read(count=100, block_ms=1)
    planned = [
        PlannedPack(
            rank=0,
            pack=ReadyPack(
                pack_id=f"p-{first}",
                record_ids=tuple(item.descriptor.record_id for item in members),
                lengths=tuple(item.descriptor.encoded_length for item in members),
                policy_version=0,
                fill=0.5,
            ),
            entry_ids=tuple(item.entry_id for item in members),
        )
        for first in range(0, len(held), 2)
        for members in [held[first : first + 2]]
    ]
    packer.commit(planned, oldest_policy_version=0, queue_limit=0)


@pytest.fixture(scope="module")
def trained_run(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, run = tmp_path_factory.mktemp("replay"), f"replay-{os.getpid()}"
    path = write_run(folder, run, redis_url)
    config = load_config(path)
    broker = access.open_broker(config)
    fill_queue(broker, training_segments(config))
    command = [sys.executable, "-m", "rollstream.commands.program", "learn", str(path)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    writer = ArchiveWriter(broker, RunFolder(folder / run).archive_dir)
    while writer.step(block_ms=1):
        pass
    writer.close()
    broker.client.unlink(*broker.client.scan_iter(broker.keys.prefix + "*"))  # a replay needs no broker
    broker.close()
    return folder / run


@pytest.mark.slow
@pytest.mark.req("Q-15", "Q-10", "Q-13")
@pytest.mark.parametrize("first_step", [None, 2])
def test_an_unchanged_replay_is_equal_to_the_bit(trained_run: Path, first_step: int | None) -> None:
    """Given a run whose last step was trained without a segment of it, which was quarantined."""
    archived = list(read_archived_events(RunFolder(trained_run).archive_dir))
    taken_out = [row for event in archived if event.kind == "quarantined" for row in event.rejected_rows()]
    assert taken_out == [("b-7", "quarantined_image")]

    report = replay_run(trained_run, ReplayOptions(first_step=first_step))

    assert [step.kind for step in report.steps] == ["A", "B", "A", "B"][first_step or 0 :]
    assert (report.max_abs_difference, report.first_differing_step) == (0.0, -1)
    assert report.weights_equal is True
    assert all(step.loss > 0 for step in report.steps)


@pytest.mark.slow
@pytest.mark.req("Q-15", "P-9")
def test_another_selector_packs_the_same_segments_and_gives_nearly_the_same_losses(trained_run: Path) -> None:
    report = replay_run(trained_run, ReplayOptions(packing_selector="exact", end_step=2))

    assert [(step.num_packs, step.replayed_num_packs) for step in report.steps] == [(2, 2), (2, 1)]
    assert report.max_abs_difference < 1e-3
    assert report.changes == ("packing selector exact",)


@pytest.mark.slow
@pytest.mark.req("Q-15")
def test_another_loss_setting_differs_from_the_first_step_on(trained_run: Path) -> None:
    report = replay_run(trained_run, ReplayOptions(loss=("w1_weight=3",), end_step=2))

    assert report.first_differing_step == 0
    assert report.max_abs_difference > 1e-3
    assert not report.is_equal


@pytest.mark.slow
def test_a_range_or_checkpoint_that_is_not_there_is_refused_by_name(trained_run: Path) -> None:
    with pytest.raises(DataError, match="within 0 to 4"):
        replay_run(trained_run, ReplayOptions(end_step=9))
    with pytest.raises(DataError, match="checkpoint-2"):
        replay_run(trained_run, ReplayOptions(first_step=1))


@pytest.mark.parametrize("setting", ["lr=3", "w1_weight", "custom.x=1"])
def test_an_unknown_loss_setting_is_refused_with_the_known_ones(setting: str) -> None:
    with pytest.raises(ConfigError, match="w1_weight"):
        check_changes(ReplayOptions(loss=(setting,)))


def test_packing_again_keeps_every_segment_of_the_step_and_the_capacity() -> None:
    packs = tuple(
        tuple(
            ReadyPack(
                pack_id=f"p-{rank}-{index}",
                record_ids=(f"s-{rank}-{index}-0", f"s-{rank}-{index}-1"),
                lengths=(20 + rank, 30 + index),
                policy_version=rank,
                fill=0.5,
            )
            for index in range(2)
        )
        for rank in range(2)
    )
    claim = StepClaim(optimizer_step=3, kind="B", reason="claimed", policy_version=4, packs=packs)

    again = repack(claim, "exact", 110)

    assert sorted(again.record_ids) == sorted(claim.record_ids)
    assert all(pack.total_tokens <= 110 for rank in again.packs for pack in rank)
    assert len(again.packs) == 2
    assert again.num_segments == claim.num_segments
