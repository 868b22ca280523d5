"""Channel A: the ground-truth payload as a segment, and its pixels, from seed, step and place alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from broker_schemas.errors import DataError
from broker_schemas.method.dataset import Sample, read_dataset
from broker_schemas.method.images import ImageProcessor
from broker_schemas.method.payload import render_payload
from broker_schemas.method.prompt import PromptBuilder
from broker_schemas.records.records import GroundTruthObject, MatchedSegment
from learner.augmentation import AugmentationSettings
from learner.channel_a import ChannelASource, build_segment, tokenize_payload
from learner.collation import CollationSettings, SegmentPixels, check_segment
from tests.builders.datasets import BOX, POLYGON, dataset_line, write_jsonl
from tests.builders.settings import channel_a_settings

NUM_SAMPLES = 5
BOX_OBJECT = GroundTruthObject(desc="WBC", geometry="bbox_2d", bins=(406, 368, 767, 784))
POLYGON_OBJECT = GroundTruthObject(desc="blé 🌿", geometry="poly", bins=(100, 10, 300, 200, 50, 400))
PLAIN = AugmentationSettings(jitter_pixels=0.0)


@pytest.fixture(scope="module")
def prompts(tiny_folder: Path) -> PromptBuilder:
    return PromptBuilder(tiny_folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    lines = []
    for index in range(NUM_SAMPLES):
        name = f"images/{index}.png"
        (root / "images").mkdir(exist_ok=True)
        noise = np.random.default_rng(index).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / name)
        lines.append(dataset_line(images=[name], objects=[dict(BOX), dict(POLYGON)][: 1 + index % 2]))
    write_jsonl(root / "train.jsonl", lines)
    return root


@pytest.fixture(scope="module")
def images(tiny_folder: Path, root: Path) -> ImageProcessor:
    return ImageProcessor(tiny_folder, root)


@pytest.fixture(scope="module")
def samples(root: Path) -> list[Sample]:
    return read_dataset(root / "train.jsonl")


def source(
    samples: Sequence[Sample], prompts: PromptBuilder, images: ImageProcessor, **changes: object
) -> ChannelASource:
    settings = replace(channel_a_settings(seed=4, effective_batch_size=4), **changes)
    return ChannelASource(samples, prompts, images, settings)


def segment_of(prompts: PromptBuilder, objects: Sequence[GroundTruthObject]) -> MatchedSegment:
    sample = Sample(
        sample_id="s-1",
        task="mixed",
        image_paths=("a.png",),
        image_files=(Path("a.png"),),
        width=64,
        height=48,
        objects=tuple(objects),
    )
    return build_segment(
        sample,
        objects,
        [(1, 8, 8)],
        prompts,
        record_id="r",
        policy_version=2,
        optimizer_step=3,
        processor_fingerprint="p",
    )


@pytest.mark.req("M-13", "M-8")
def test_every_token_of_the_answer_is_in_exactly_one_loss_and_no_token_of_the_prompt(
    prompts: PromptBuilder,
) -> None:
    segment = segment_of(prompts, [BOX_OBJECT, POLYGON_OBJECT])
    segment.check("segment")
    in_slots = np.zeros(segment.encoded_length, bool)
    in_slots[segment.slot_positions] = True
    assert not (in_slots & segment.ce_mask).any()
    assert (in_slots | segment.ce_mask)[segment.prompt_length :].all()
    assert not (in_slots | segment.ce_mask)[: segment.prompt_length].any()
    assert segment.token_ids[-1] == prompts.end_token_id
    assert segment.ce_mask[-1]
    assert segment.channel == "A"
    assert not segment.slot_in_prefix.any()


def test_slots_are_the_bins_of_the_objects_in_order(prompts: PromptBuilder) -> None:
    segment = segment_of(prompts, [BOX_OBJECT, POLYGON_OBJECT])
    assert segment.slot_targets.tolist() == [*BOX_OBJECT.bins, *POLYGON_OBJECT.bins]
    ids = segment.token_ids[segment.slot_positions]
    assert [prompts.coord_vocab.bin_by_id[int(token_id)] for token_id in ids] == segment.slot_targets.tolist()


def test_the_answer_decodes_to_the_payload(prompts: PromptBuilder) -> None:
    segment = segment_of(prompts, [BOX_OBJECT, POLYGON_OBJECT])
    answer = segment.token_ids[segment.prompt_length : -1].tolist()
    text = prompts.tokenizer.decode(answer, skip_special_tokens=False)
    assert text == render_payload([BOX_OBJECT, POLYGON_OBJECT]).text


def test_desc_tokens_are_those_that_overlap_a_desc_value(prompts: PromptBuilder) -> None:
    tokens = tokenize_payload([BOX_OBJECT, POLYGON_OBJECT], prompts, where="here")
    chosen = [int(token_id) for token_id in tokens.token_ids[tokens.is_desc]]
    text = prompts.tokenizer.decode(chosen, skip_special_tokens=False)
    assert "WBC" in text
    assert "blé 🌿" in text
    assert "bbox_2d" not in text
    assert tokens.is_desc.sum() < len(tokens.token_ids) / 2
    assert not (tokens.is_desc & tokens.is_slot).any()


def test_no_objects_are_an_empty_map_and_the_end_token(prompts: PromptBuilder) -> None:
    segment = segment_of(prompts, [])
    answer = segment.token_ids[segment.prompt_length :]
    assert prompts.tokenizer.decode(answer[:-1].tolist()) == "{}"
    assert len(segment.slot_positions) == 0
    assert segment.ce_mask[segment.prompt_length :].all()


@pytest.mark.req("M-4")
def test_a_coordinate_token_in_a_desc_is_text_and_trained_by_no_loss(prompts: PromptBuilder) -> None:
    item = replace(BOX_OBJECT, desc="a <|coord_5|> b")
    segment = segment_of(prompts, [item])
    coordinate_id = int(prompts.coord_vocab.ids[5])
    position = int(np.flatnonzero(segment.token_ids == coordinate_id)[0])
    assert position not in segment.slot_positions
    assert not segment.ce_mask[position]
    assert segment.slot_targets.tolist() == list(BOX_OBJECT.bins)


@pytest.mark.req("Q-10")
def test_an_item_depends_on_seed_step_and_place_alone(
    samples: list[Sample], prompts: PromptBuilder, images: ImageProcessor
) -> None:
    moving = AugmentationSettings(crop_probability=0.5, shrink_probability=0.5, flip_probability=0.5)
    whole = source(samples, prompts, images, augmentation=moving).load_items(7, range(4), 0)
    again = source(samples, prompts, images, augmentation=moving)
    parts = [*again.load_items(7, [0, 1], 0), *again.load_items(7, [2, 3], 0)]
    for (first, first_pixels), (second, second_pixels) in zip(whole, parts, strict=True):
        assert first.encode_body() == second.encode_body()
        assert torch.equal(first_pixels.patches, second_pixels.patches)
    other = again.load_items(8, range(4), 0)
    assert [segment.sample_id for segment, _ in other] != [segment.sample_id for segment, _ in whole]


def test_jitter_moves_targets_and_leaves_the_stored_pixels(
    samples: list[Sample], prompts: PromptBuilder, images: ImageProcessor
) -> None:
    still = source(samples, prompts, images, augmentation=PLAIN).load_items(0, range(4), 0)
    jittered = source(samples, prompts, images).load_items(0, range(4), 0)
    assert any(
        a.slot_targets.tolist() != b.slot_targets.tolist()
        for (a, _), (b, _) in zip(still, jittered, strict=True)
    )
    for (a, first), (b, second) in zip(still, jittered, strict=True):
        assert torch.equal(first.patches, second.patches)
        # one pixel of 48 rows is 21 bins: half of that at most, and one for rounding
        difference = np.abs(a.slot_targets.astype(int) - b.slot_targets.astype(int))
        assert difference.max() <= 12


def test_augmentation_changes_pixels_but_not_the_grid(
    samples: list[Sample], prompts: PromptBuilder, images: ImageProcessor
) -> None:
    flipped = AugmentationSettings(jitter_pixels=0.0, flip_probability=1.0)
    still = source(samples, prompts, images, augmentation=PLAIN).load_items(0, [0], 0)[0]
    moved = source(samples, prompts, images, augmentation=flipped).load_items(0, [0], 0)[0]
    assert not torch.equal(still[1].patches, moved[1].patches)
    assert torch.equal(still[1].grids_thw, moved[1].grids_thw)
    assert still[0].slot_targets.tolist() != moved[0].slot_targets.tolist()


@pytest.mark.req("M-11")
def test_items_pass_the_checks_of_collation(
    samples: list[Sample], prompts: PromptBuilder, images: ImageProcessor
) -> None:
    settings = CollationSettings(
        image_token_id=prompts.image_token_id,
        merge_size=prompts.merge_size,
        processor_fingerprint=images.fingerprint,
        coord_ids=frozenset(int(token_id) for token_id in prompts.coord_vocab.ids),
    )
    for segment, pixels in source(samples, prompts, images).load_items(1, range(4), 6):
        segment.check("item")
        check_segment(segment, pixels, settings)
        assert isinstance(pixels, SegmentPixels)
        assert (segment.policy_version, segment.optimizer_step) == (6, 1)


def test_no_samples_are_refused(prompts: PromptBuilder, images: ImageProcessor) -> None:
    with pytest.raises(DataError, match="no training samples"):
        source([], prompts, images)
