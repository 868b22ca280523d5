"""Rollouts by transformers ``generate`` in this process: batched, left padded, without gradients [M-2]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from broker_schemas.broker.policy import PublishedPolicy
from broker_schemas.errors import DataError
from broker_schemas.method.adapter_folder import is_adapter, load_adapter, read_adapter
from broker_schemas.method.dataset import Sample
from broker_schemas.method.images import ImageProcessor
from broker_schemas.method.model_folder import load_policy
from broker_schemas.method.prompt import PromptBuilder
from broker_schemas.records.records import Purpose
from producers.rollout_backend import DecodingSettings, Generation


class ChosenLogprobs(LogitsProcessor):  # type: ignore[misc]
    """Collects log-probabilities of the tokens that were taken, holding one row of logits at a time.

    They are the model's own where nothing changed the scores before: it comes first in the list.

    Keeping all scores instead would cost batch x tokens x vocabulary floats.
    """

    def __init__(self) -> None:
        self._previous: torch.Tensor | None = None
        self._chosen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._take(input_ids[:, -1])
        self._previous = torch.log_softmax(scores.float(), dim=-1)
        return scores

    def _take(self, tokens: torch.Tensor) -> None:
        if self._previous is not None:
            self._chosen.append(self._previous.gather(1, tokens[:, None]).squeeze(1))

    def finish(self, last_tokens: torch.Tensor) -> NDArray[np.float32]:
        """Return (batch, new tokens) float32 once generation has ended with ``last_tokens`` (batch,)."""
        self._take(last_tokens)
        logprobs: NDArray[np.float32] = torch.stack(self._chosen, dim=1).cpu().numpy()
        return logprobs


@dataclass(frozen=True, kw_only=True)
class HfBackendSettings:
    """``decode_batch_size`` caps one generation call; ``device`` is a torch device name. ``base`` is the
    folder of the model that adapters are put on.
    """

    decoding: DecodingSettings
    decode_batch_size: int
    device: str = "cpu"
    dtype: str
    base: Path | None = None


class HfBackend:
    """Generates in this process with the weights of the published folder.

    An adapter goes on the base, which is loaded once.
    """

    def __init__(
        self,
        prompts: PromptBuilder,
        images: ImageProcessor,
        settings: HfBackendSettings,
        model: Any = None,
        *,
        evaluation_images: ImageProcessor | None = None,
    ) -> None:
        self._prompts = prompts
        self._images = images
        self._evaluation_images = evaluation_images or images
        self._settings = settings
        self._model = model
        self._policy_version = 0 if model is not None else -1

    @property
    def policy_version(self) -> int:
        return self._policy_version

    @property
    def processor_fingerprint(self) -> str:
        return self._images.fingerprint

    def follow(self, policy: PublishedPolicy) -> None:
        """Load the weights of ``policy`` unless they are in use; raises DataError."""
        if policy.policy_version == self._policy_version:
            return
        folder, settings = Path(policy.weights_path), self._settings
        if self._model is None:
            self._model = load_policy(folder, settings.dtype, base=settings.base).to(settings.device)
        elif is_adapter(folder):
            load_adapter(self._model, read_adapter(folder), folder)
        else:
            load_weights(self._model, folder)
        self._policy_version = policy.policy_version

    def generate(
        self, samples: Sequence[Sample], seeds: Sequence[int], *, purpose: Purpose = "train"
    ) -> list[Generation]:
        """Generate in batches of at most ``decode_batch_size``; raises DataError for an unreadable image."""
        generations: list[Generation] = []
        size = self._settings.decode_batch_size
        for start in range(0, len(samples), size):
            batch = slice(start, start + size)
            generations += self._generate_batch(samples[batch], seeds[batch], purpose)
        return generations

    def close(self) -> None:
        self._model = None

    @torch.inference_mode()
    def _generate_batch(
        self, samples: Sequence[Sample], seeds: Sequence[int], purpose: Purpose
    ) -> list[Generation]:
        if self._model is None:
            raise DataError("generation: no weights yet, expected a published policy; follow() one first")
        opener = self._images if purpose == "train" else self._evaluation_images
        loaded = [[opener.load(image) for image in sample.image_paths] for sample in samples]
        grids = [tuple(grid for _, grid in images) for images in loaded]
        prompts = [self._prompts.build_ids(grid) for grid in grids]
        pixel_rows = [pixels for images in loaded for pixels, _ in images]
        # the seed of the first rollout drives the batch; a chunk is always cut the same way
        torch.manual_seed(seeds[0])
        logprobs = ChosenLogprobs()
        output = self._model.generate(
            **self._inputs(prompts, grids, pixel_rows),
            **self._sampling(self._settings.decoding.for_purpose(purpose)),
            logits_processor=LogitsProcessorList([logprobs, *self._penalties()]),
        )
        width = max(len(prompt) for prompt in prompts)
        response = output[:, width:].cpu()
        chosen = logprobs.finish(output[:, -1])
        return [
            self._generation(prompts[row], response[row].numpy(), chosen[row], grids[row])
            for row in range(len(samples))
        ]

    def _inputs(
        self,
        prompts: Sequence[NDArray[np.int32]],
        grids: Sequence[tuple[tuple[int, int, int], ...]],
        pixel_rows: Sequence[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        width = max(len(prompt) for prompt in prompts)
        ids_bt = torch.full((len(prompts), width), self._prompts.end_token_id, dtype=torch.long)
        mask_bt = torch.zeros_like(ids_bt)
        for row, prompt in enumerate(prompts):
            ids_bt[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask_bt[row, width - len(prompt) :] = 1
        inputs = {"input_ids": ids_bt, "attention_mask": mask_bt}
        if pixel_rows:
            inputs["pixel_values"] = torch.cat(list(pixel_rows)).to(self._model.dtype)
            inputs["image_grid_thw"] = torch.tensor([grid for entry in grids for grid in entry])
            inputs["mm_token_type_ids"] = (ids_bt == self._prompts.image_token_id).int()
        return {name: tensor.to(self._settings.device) for name, tensor in inputs.items()}

    def _penalties(self) -> list[LogitsProcessor]:
        penalty = self._settings.decoding.repetition_penalty
        return [] if penalty == 1.0 else [RepetitionPenaltyLogitsProcessor(penalty=float(penalty))]

    def _sampling(self, decoding: DecodingSettings) -> dict[str, Any]:
        chosen: dict[str, Any] = {
            "max_new_tokens": decoding.max_new_tokens,
            "do_sample": decoding.temperature > 0,
            "eos_token_id": self._prompts.end_token_id,
            "pad_token_id": self._prompts.end_token_id,
            # the list of processors has it: log-probabilities are taken before it
            "repetition_penalty": 1.0,
        }
        if decoding.temperature > 0:
            chosen["temperature"] = decoding.temperature
            chosen["top_p"] = decoding.top_p
            chosen["top_k"] = max(decoding.top_k, 0)
        return chosen

    def _generation(
        self,
        prompt: NDArray[np.int32],
        response: NDArray[np.int64],
        logprobs: NDArray[np.float32],
        grids: tuple[tuple[int, int, int], ...],
    ) -> Generation:
        ends = np.flatnonzero(response == self._prompts.end_token_id)
        length = int(ends[0]) + 1 if len(ends) else len(response)
        return Generation(
            prompt_token_ids=prompt,
            response_token_ids=response[:length].astype(np.int32),
            response_logprobs=np.ascontiguousarray(logprobs[:length]),
            grids_thw=grids,
            finish_reason="stop" if len(ends) else "length",
            policy_version=self._policy_version,
        )


def load_weights(model: Any, folder: Path) -> None:
    """Copy the safetensors of a Hugging Face ``folder`` into ``model`` in place; raises DataError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"policy folder {folder}: no *.safetensors, expected published weights")
    merged: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            merged.update(load_file(file))
        except (OSError, SafetensorError) as exc:
            raise DataError(f"policy file {file}: cannot be read ({exc}); is its disk full or away?") from exc
    model.tie_weights()
    missing, unexpected = model.load_state_dict(merged, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    lost = [name for name in missing if name not in tied]
    if lost or unexpected:
        raise DataError(
            f"policy folder {folder}: {len(lost)} weights missing, {len(unexpected)} unknown "
            f"(first {(lost + list(unexpected))[0]}), expected those of the same model"
        )
