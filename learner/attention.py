"""Which attention kernel runs packed rows; each keeps segments apart where the text positions restart."""

from __future__ import annotations

import torch

HALF_PRECISIONS = (torch.bfloat16, torch.float16)


def attention_implementation(device: torch.device, dtype: torch.dtype) -> str:
    """Return transformers' name of the kernel: flash attention where it is installed and can run.

    Flash attention takes half precision on a GPU only and skips other segments' blocks; sdpa runs everywhere
    with a dense block-diagonal mask, so its cost grows with the square of the row.
    """
    from transformers.utils import is_flash_attn_2_available

    if device.type == "cuda" and dtype in HALF_PRECISIONS and is_flash_attn_2_available():
        return "flash_attention_2"
    return "sdpa"
