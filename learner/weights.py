"""Published policies: Hugging Face folders ``policy/v<policy_version>`` that producers follow [V-2, V-6]."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from torch import Tensor

from learner.checkpoints import save_weights
from learner.companions import Companions
from learner.trained_weights import TrainedWeights
from learner.whole_directory import keep_last, whole_directory

PREFIX: Final = "v"


def policy_version_at(optimizer_step: int, sync_every_steps: int) -> int:
    """Return the policy version that is current while optimizer
    step ``optimizer_step`` is decided and trained.

    Version 0 is published before step 0, version n after n·``sync_every_steps`` steps are done.
    """
    return optimizer_step // sync_every_steps


def is_publication_due(num_steps_done: int, sync_every_steps: int) -> bool:
    """Return whether a new policy version is published after ``num_steps_done`` steps."""
    return num_steps_done % sync_every_steps == 0


def kept_policy(parent: Path, policy_version: int, state_step: int, sync_every_steps: int) -> Path | None:
    """Return the folder of a version that a run resumed between two publications has published already.

    Its weights are those of the step at which it was published; the ones of ``state_step`` are later, and
    under the same number they would be another policy than the one that rollouts were made with. None at the
    step of the publication itself, or where the folder is gone.
    """
    path = parent / f"{PREFIX}{policy_version}"
    is_between = policy_version * sync_every_steps != state_step
    return path if is_between and path.is_dir() else None


def publish_weights(
    parent: Path,
    *,
    trained: TrainedWeights,
    tensors: Mapping[str, Tensor] | None = None,
    policy_version: int,
    companions: Companions,
    num_kept: int,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write ``v<policy_version>`` whole in ``dtype`` (None: as the model computes); return its path.

    All but the ``num_kept`` highest are dropped.

    Called on rank 0 alone, between two barriers. Raises RunStopped when the disk refuses.
    """
    final = parent / f"{PREFIX}{policy_version}"
    with whole_directory(final) as staging:
        try:
            save_weights(trained, staging, tensors, dtype)
            if trained.adapter is None:
                # beside an adapter they would outweigh it, and its base has them
                companions.copy_to(staging)
        except SafetensorError as exc:
            raise OSError(str(exc)) from exc
    keep_last(parent, PREFIX, num_kept)
    return final
