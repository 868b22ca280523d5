"""Channel A: ground-truth samples as training segments, one teacher-forced forward and no rollout [M-13].

An item is a pure function of (seed, optimizer step, place in the step), so a resume rebuilds it to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from broker_schemas.errors import DataError
from broker_schemas.method.dataset import Ordering, Sample, order_objects
from broker_schemas.method.images import ImageProcessor, open_image
from broker_schemas.method.payload import render_payload
from broker_schemas.method.prompt import PromptBuilder
from broker_schemas.records.records import GroundTruthObject, ImageReference, MatchedSegment
from learner.augmentation import AugmentationSettings, draw_transform, move_object
from learner.collation import SegmentPixels
from learner.dataset_positions import sample_indices


@dataclass(frozen=True, kw_only=True)
class ChannelASettings:
    """``seed`` of the sample order and of every draw; ``ordering`` of the objects in the payload."""

    seed: int
    effective_batch_size: int
    ordering: Ordering = "sorted"
    augmentation: AugmentationSettings = AugmentationSettings()


@dataclass(frozen=True, kw_only=True)
class PayloadTokens:
    """A tokenised assistant payload with its end token, A tokens: ids (A,) int32 and what each one is.

    ``is_desc`` (A,): overlaps a ``desc`` value; ``is_slot`` (A,): a
    coordinate of a geometry; ``bins`` (slots,).
    """

    token_ids: NDArray[np.int32]
    is_desc: NDArray[np.bool_]
    is_slot: NDArray[np.bool_]
    is_coord: NDArray[np.bool_]
    bins: NDArray[np.int16]


class ChannelASource:
    """Builds the segments of A steps from ground truth; safe to call from a thread."""

    def __init__(
        self,
        samples: Sequence[Sample],
        prompts: PromptBuilder,
        images: ImageProcessor,
        settings: ChannelASettings,
    ) -> None:
        if not samples:
            raise DataError(
                "channel A: got no training samples, expected at least one; check data.train_jsonl"
            )
        self._samples = samples
        self._prompts = prompts
        self._images = images
        self._settings = settings

    @property
    def num_segments(self) -> int:
        """Segments of every A step over all ranks."""
        return self._settings.effective_batch_size

    def load_items(
        self, optimizer_step: int, places: Sequence[int], policy_version: int
    ) -> list[tuple[MatchedSegment, SegmentPixels]]:
        """Return the segments at ``places`` (0 to ``num_segments`` - 1) of the step, in that order.

        Raises DataError that names the image or sample that cannot be used.
        """
        settings = self._settings
        indices = sample_indices(
            optimizer_step=optimizer_step,
            effective_batch_size=settings.effective_batch_size,
            num_samples=len(self._samples),
            seed=settings.seed,
        )
        return [
            self._load_item(self._samples[indices[place]], optimizer_step, place, policy_version)
            for place in places
        ]

    def _load_item(
        self, sample: Sample, optimizer_step: int, place: int, policy_version: int
    ) -> tuple[MatchedSegment, SegmentPixels]:
        settings = self._settings
        rng = np.random.default_rng([settings.seed, optimizer_step, place])
        objects, pixels = self._draw(sample, rng)
        ordered = order_objects(objects, settings.ordering, seed=settings.seed, sample_id=sample.sample_id)
        segment = build_segment(
            sample,
            ordered,
            [(int(t), int(h), int(w)) for t, h, w in pixels.grids_thw],
            self._prompts,
            record_id=f"A-{optimizer_step}-{place}-{sample.sample_id}"[:200],
            policy_version=policy_version,
            optimizer_step=optimizer_step,
            processor_fingerprint=self._images.fingerprint,
        )
        return segment, pixels

    def _draw(
        self, sample: Sample, rng: np.random.Generator
    ) -> tuple[tuple[GroundTruthObject, ...], SegmentPixels]:
        augmentation = self._settings.augmentation
        if len(sample.image_paths) > 1:
            # the objects of several images have no one pixel grid to jitter on
            return sample.objects, self._load_stored(sample)
        transform = draw_transform(sample.width, sample.height, sample.objects, augmentation, rng)
        objects = tuple(
            move_object(item, transform, augmentation.jitter_pixels, rng) for item in sample.objects
        )
        if transform.is_identity:
            return objects, self._load_stored(sample)
        image = transform.move_image(open_image(sample.image_files[0]))
        patches, grid = self._images.process(image, name=str(sample.image_files[0]))
        return objects, SegmentPixels(patches=patches, grids_thw=torch.tensor([grid]))

    def _load_stored(self, sample: Sample) -> SegmentPixels:
        loaded = [self._images.load(path) for path in sample.image_paths]
        return SegmentPixels(
            patches=torch.cat([patches for patches, _ in loaded]),
            grids_thw=torch.tensor([grid for _, grid in loaded]),
        )


def build_segment(
    sample: Sample,
    objects: Sequence[GroundTruthObject],
    grids_thw: Sequence[tuple[int, int, int]],
    prompts: PromptBuilder,
    *,
    record_id: str,
    policy_version: int,
    optimizer_step: int,
    processor_fingerprint: str,
) -> MatchedSegment:
    """Return prompt, payload of ``objects`` and end token as a
    channel A segment (ROLLOUT_MATCHING section 7).
    """
    prompt_ids = prompts.build_ids(grids_thw)
    payload = tokenize_payload(objects, prompts, where=f"sample {sample.sample_id}")
    before = np.zeros(len(prompt_ids), bool)
    is_text = ~payload.is_coord
    slots = np.flatnonzero(payload.is_slot) + len(prompt_ids)
    return MatchedSegment(
        record_id=record_id,
        channel="A",
        policy_version=policy_version,
        sample_id=sample.sample_id,
        task=sample.task,
        images=tuple(
            ImageReference(path=path, width=sample.width, height=sample.height, grid_thw=grid)
            for path, grid in zip(sample.image_paths, grids_thw, strict=True)
        ),
        processor_fingerprint=processor_fingerprint,
        token_ids=np.concatenate([prompt_ids, payload.token_ids]).astype(np.int32),
        prompt_length=len(prompt_ids),
        ce_mask=np.concatenate([before, is_text]),
        desc_mask=np.concatenate([before, payload.is_desc & is_text]),
        slot_positions=slots.astype(np.int32),
        slot_targets=payload.bins,
        slot_in_prefix=np.zeros(len(slots), bool),
        optimizer_step=optimizer_step,
    )


def tokenize_payload(
    objects: Sequence[GroundTruthObject], prompts: PromptBuilder, *, where: str
) -> PayloadTokens:
    """Return the payload's tokens; raises DataError naming ``where`` when its coordinates are not its bins.

    A coordinate token inside a ``desc`` is text that looks like one: neither slot nor cross-entropy.
    """
    rendered = render_payload(objects)
    encoded = prompts.tokenizer.encode(rendered.text, add_special_tokens=False)
    token_ids = np.asarray([*encoded.ids, prompts.end_token_id], np.int32)
    starts, ends = np.asarray([*encoded.offsets, (len(rendered.text),) * 2]).T
    is_desc = np.zeros(len(token_ids), bool)
    for first, last in rendered.desc_spans:
        is_desc |= (starts < last) & (ends > first)
    is_coord = np.isin(token_ids, prompts.coord_vocab.ids)
    is_slot = is_coord & ~is_desc
    bins = [prompts.coord_vocab.bin_by_id[int(token_id)] for token_id in token_ids[is_slot]]
    expected = [value for item in objects for value in item.bins]
    if bins != expected:
        raise DataError(
            f"{where}: the tokenised payload holds {len(bins)} coordinate tokens, expected its "
            f"{len(expected)} bins in order; does the tokenizer keep <|coord_k|> whole?"
        )
    return PayloadTokens(
        token_ids=token_ids,
        is_desc=is_desc,
        is_slot=is_slot,
        is_coord=is_coord,
        bins=np.asarray(bins, np.int16),
    )
