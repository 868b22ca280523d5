"""The port behind which rollouts are generated: prompts in, generations out, no gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from broker_schemas.broker.policy import PublishedPolicy
from broker_schemas.method.dataset import Sample
from broker_schemas.records.records import Purpose


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """Sampling. ``temperature`` 0 is greedy; ``top_k`` -1 and ``top_p`` 1 are off."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float

    def for_purpose(self, purpose: Purpose) -> DecodingSettings:
        """Return how rollouts of a purpose are sampled: greedily to evaluate."""
        return self if purpose == "train" else replace(self, temperature=0.0, top_p=1.0, top_k=-1)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one prompt gave.

    ``prompt_token_ids`` (P,) and ``response_token_ids`` (R,) int32, the end token included where the model
    wrote it; ``response_logprobs`` (R,) float32, natural logarithm, of the tokens taken, or empty.
    ``grids_thw`` holds an entry an image. ``version_spans`` as in SegmentRecord.
    """

    prompt_token_ids: NDArray[np.int32]
    response_token_ids: NDArray[np.int32]
    response_logprobs: NDArray[np.float32]
    grids_thw: tuple[tuple[int, int, int], ...]
    finish_reason: Literal["stop", "length"]
    policy_version: int
    version_spans: tuple[tuple[int, int], ...] = ()


class RolloutBackend(Protocol):
    """Generates with the weights of a published policy."""

    @property
    def policy_version(self) -> int:
        """Version of the weights in use, -1 before the first."""

    @property
    def processor_fingerprint(self) -> str:
        """Fingerprint of the image processor."""

    def follow(self, policy: PublishedPolicy) -> None:
        """Take the weights of ``policy`` if they are not in use already; raises BrokerError or DataError."""

    def generate(
        self, samples: Sequence[Sample], seeds: Sequence[int], *, purpose: Purpose = "train"
    ) -> list[Generation]:
        """Generate one rollout a sample, in order; ``seeds`` go with the samples.

        To evaluate, samples are of the validation set and generation is greedy.
        """

    def close(self) -> None:
        """Free what is held."""
