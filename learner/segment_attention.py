"""Attention functions for transformers that never leave a segment: its borders are where positions are 0.

Each takes a packed row without any mask; with a mask or a cache,
as in generation, transformers' own sdpa runs.

Shapes: B batch, T tokens, N heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

# no name may hold "flash": transformers would look for that kernel by itself
SEGMENTS: Final = "rollstream_segments"
TORCH_VARLEN: Final = "rollstream_varlen"
FLASH: Final = "rollstream_varlen_package"

# one row has one position tensor for all its layers; reading it once spares a wait for the GPU in each
_BORDERS = WeakTensorKeyDictionary()

Kernel = Callable[[Tensor, Tensor, Tensor, Sequence[int], float | None, float], Tensor]
"""(query, key, value (1, N, T, D), borders, scaling, dropout) -> (1, T, N, D)."""


def register_kernels() -> None:
    """Make the names known to transformers; again is harmless."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name, kernel in ((SEGMENTS, _by_segment), (TORCH_VARLEN, _torch_varlen), (FLASH, _flash)):
        AttentionInterface.register(name, _attention_with(kernel))
        AttentionMaskInterface.register(name, _mask)


def segment_borders(position_ids: Tensor) -> list[int]:
    """Return where segments begin in a row of text positions (1, T), and T; a row that begins inside one
    counts as beginning one.
    """
    borders: list[int] | None = _BORDERS.get(position_ids)  # type: ignore[no-untyped-call]
    if borders is None:
        starts = torch.nonzero(position_ids[0] == 0)[:, 0].tolist()
        borders = sorted({0, *starts, position_ids.shape[1]})
        _BORDERS[position_ids] = borders
    return borders


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    is_whole = kwargs.get("q_length") == kwargs.get("kv_length") and kwargs.get("batch_size") == 1
    if is_whole and kwargs.get("attention_mask") is None:
        return None
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _attention_with(kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        position_ids = kwargs.get("position_ids")
        is_row = query.shape[0] == 1 and query.shape[2] == key.shape[2] and attention_mask is None
        if not is_row or position_ids is None or position_ids.shape[-1] != query.shape[2]:
            return _sdpa(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return kernel(query, key, value, segment_borders(position_ids), scaling, dropout), None

    return attention


def _sdpa(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output: tuple[Tensor, None] = sdpa_attention_forward(*args, **kwargs)
    return output


def _by_segment(
    query: Tensor, key: Tensor, value: Tensor, borders: Sequence[int], scaling: float | None, dropout: float
) -> Tensor:
    shares_heads = query.shape[1] != key.shape[1]
    pieces = [
        scaled_dot_product_attention(
            query[:, :, first:end],
            key[:, :, first:end],
            value[:, :, first:end],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=shares_heads,
        )
        for first, end in zip(borders[:-1], borders[1:], strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2)


def _torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, borders: Sequence[int], scaling: float | None, dropout: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout:  # this kernel has none
        return _by_segment(query, key, value, borders, scaling, dropout)
    offsets, longest = _offsets(borders, query.device)
    query_tnd, key_tnd, value_tnd = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    output = varlen_attn(
        query_tnd,
        key_tnd,
        value_tnd,
        offsets,
        offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


def _flash(
    query: Tensor, key: Tensor, value: Tensor, borders: Sequence[int], scaling: float | None, dropout: float
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    offsets, longest = _offsets(borders, query.device)
    output = flash_attn_varlen_func(
        *(tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)),
        *(offsets, offsets, longest, longest),
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
    )
    return torch.as_tensor(output)[None]


def _offsets(borders: Sequence[int], device: torch.device) -> tuple[Tensor, int]:
    longest = max(end - first for first, end in zip(borders[:-1], borders[1:], strict=True))
    return torch.tensor(list(borders), dtype=torch.int32, device=device), longest
