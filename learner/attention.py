"""Which attention runs packed rows, and why; every choice costs the sum of the segments' squares [L-10]."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from broker_schemas.errors import ConfigError
from learner.segment_attention import FLASH, SEGMENTS, TORCH_VARLEN, register_kernels

Wanted = Literal["auto", "flash", "segments"]
HALF_PRECISIONS = (torch.bfloat16, torch.float16)
# the first architecture that the variable-length kernels are written for
_LOWEST_CAPABILITY = (8, 0)


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """``kernel``: transformers' name of what runs the text layers. ``why``: one line for log and doctor."""

    kernel: str
    why: str


def choose_attention(wanted: Wanted, device: torch.device, dtype: torch.dtype) -> AttentionChoice:
    """Return what runs packed rows in ``dtype`` on ``device``: variable-length kernels where there are some.

    ``flash`` raises ConfigError with the reason where none can run; ``auto`` then goes segment by segment.
    """
    if wanted == "segments":
        return AttentionChoice(kernel=SEGMENTS, why="segment by segment, as model.attention says")
    kernel, lacking = _varlen_kernel(device, dtype)
    if kernel is not None:
        package = "flash-attn" if kernel == FLASH else f"torch {torch.__version__.partition('+')[0]}"
        return AttentionChoice(kernel=kernel, why=f"variable-length kernels of {package}")
    if wanted == "flash":
        raise ConfigError(f"model.attention: got flash, but {lacking}; set it to auto or segments")
    return AttentionChoice(kernel=SEGMENTS, why=f"segment by segment: {lacking}")


def use_attention(model: Any, choice: AttentionChoice) -> None:
    """Let ``model`` run ``choice``: its text layers packed rows, its vision tower each image by itself."""
    register_kernels()
    has_package = choice.kernel == FLASH
    vision = "flash_attention_2" if has_package else "sdpa"
    model.set_attn_implementation({"": "sdpa", "text_config": choice.kernel, "vision_config": vision})


def _varlen_kernel(device: torch.device, dtype: torch.dtype) -> tuple[str | None, str]:
    if device.type != "cuda":
        return None, f"variable-length kernels need a GPU, the device is {device.type}"
    if dtype not in HALF_PRECISIONS:
        return None, f"variable-length kernels take bfloat16, training.precision is {dtype}".replace(
            "torch.", ""
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _LOWEST_CAPABILITY:
        found = ".".join(str(part) for part in capability)
        return None, f"variable-length kernels need compute capability 8.0, this GPU has {found}"
    if find_spec("flash_attn") is not None:
        return FLASH, ""
    if find_spec("torch.nn.attention.varlen") is not None:
        return TORCH_VARLEN, ""
    return None, f"neither flash-attn is installed nor has torch {torch.__version__} varlen_attn"
