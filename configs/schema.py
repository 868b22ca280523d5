"""The whole configuration as one frozen tree; checks across sections live in `cross_checks`."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

from pydantic import Field, PrivateAttr

from configs.broker_sections import BrokerSection
from configs.problems import KeyPath, Source
from configs.rollout_sections import CustomSection, RolloutMatchingSection, Variant
from configs.run_sections import (
    ArchiveSection,
    DataSection,
    DevicesSection,
    MatchersSection,
    MetricsSection,
    ModelSection,
    ProducersSection,
    RunSection,
    TrackingSection,
)
from configs.section import Section
from configs.training_sections import EvaluationSection, Stage2AbSection, Stage2AsyncSection, TrainingSection

AB_VARIANTS = ("stage2_ab_training", "stage2_async")


class RunConfig(Section):
    """One run, as read by `load_config`; get it from there, so that the checks across sections have run."""

    run: RunSection
    data: DataSection
    model: ModelSection
    custom: CustomSection
    stage2_ab: Stage2AbSection = Field(default_factory=Stage2AbSection)
    stage2_async: Stage2AsyncSection = Field(default_factory=Stage2AsyncSection)
    training: TrainingSection
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    broker: BrokerSection = Field(default_factory=BrokerSection)
    devices: DevicesSection = Field(default_factory=DevicesSection)
    producers: ProducersSection = Field(default_factory=ProducersSection)
    matchers: MatchersSection = Field(default_factory=MatchersSection)
    archive: ArchiveSection = Field(default_factory=ArchiveSection)
    metrics: MetricsSection = Field(default_factory=MetricsSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)

    _sources: Mapping[KeyPath, Source] = PrivateAttr(default_factory=dict)

    @property
    def sources(self) -> Mapping[KeyPath, Source]:
        """Where each key was written; a key that is missing here has its default."""
        return self._sources

    def with_sources_recorded(self, sources: Mapping[KeyPath, Source]) -> RunConfig:
        """The same configuration, knowing where its values were written."""
        copy = self.model_copy()
        copy._sources = dict(sources)
        return copy

    @property
    def variant(self) -> Variant:
        """Short for `custom.trainer_variant`."""
        return self.custom.trainer_variant

    @property
    def rollout_matching(self) -> RolloutMatchingSection:
        """Short for `custom.extra.rollout_matching`."""
        return self.custom.extra.rollout_matching

    @property
    def b_ratio(self) -> Fraction:
        """The exact share of rollout steps; 1 where every step is a rollout step."""
        if self.variant not in AB_VARIANTS:
            return Fraction(1)
        ratio = self.stage2_ab.schedule.b_ratio
        assert ratio is not None, "the cross checks refuse an A/B variant without b_ratio"
        return Fraction(ratio)

    @property
    def evaluates_in_stack(self) -> bool:
        """Whether producers answer for the validation set beside training [L-8]."""
        is_due = self.training.eval_every_steps > 0 and self.data.val_jsonl is not None
        return is_due and self.b_ratio > 0 and self.evaluation.in_stack is not False

    @property
    def learner_world_size(self) -> int:
        """W, the number of learner ranks."""
        return self.devices.learner_world_size

    @property
    def precision(self) -> Literal["bf16", "float32"]:
        """`training.precision`, or its default: bf16 where the learner has GPUs."""
        return self.training.precision or ("bf16" if self.devices.learner_gpus else "float32")

    @property
    def rollout_dtype(self) -> Literal["float32", "bfloat16"]:
        """Number format of published weights and of rollouts."""
        return self.model.dtype or ("bfloat16" if self.precision == "bf16" else "float32")

    @property
    def rollouts_per_micro_step(self) -> int:
        """Raw rollouts of one micro-step over all ranks: per_device_train_batch_size x W."""
        return self.training.per_device_train_batch_size * self.learner_world_size

    @property
    def gradient_accumulation_steps(self) -> int:
        """GA = effective_batch_size / (per_device_train_batch_size x W); checked to be exact [S-2]."""
        return self.training.effective_batch_size // self.rollouts_per_micro_step

    @property
    def rollouts_per_rank_per_step(self) -> int:
        """Raw rollouts of one optimizer step that belong to one rank."""
        return self.training.effective_batch_size // self.learner_world_size
