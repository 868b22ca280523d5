"""How much memory a piece of work holds at its worst, above what was there when it began."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class MemoryMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes of tensors that appear while it is entered; ``peak_bytes`` is the most at one time.

    What one kernel takes and gives back inside itself is not seen. ``skips_products`` gives zeros for matrix
    products and attention instead of computing them: their memory is the same, and bfloat16 is slow on most
    CPUs.
    """

    def __init__(self, *, skips_products: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._skips_products = skips_products
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in _flat((args, *(kwargs or {}).values())):
            self._note(leaf, is_new=False)
        skipped = _without_product(func, args) if self._skips_products else None
        output = func(*args, **(kwargs or {})) if skipped is None else skipped
        for leaf in _flat((output,)):
            self._note(leaf, is_new=True)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return output

    def _note(self, leaf: Any, *, is_new: bool) -> None:
        if not isinstance(leaf, torch.Tensor):
            return
        storage = leaf.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        num_bytes = storage.nbytes() if is_new else 0
        self.live_bytes += num_bytes
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Yield what is in ``values`` and in lists within; operators take and give nothing deeper."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


def _without_product(func: Any, args: tuple[Any, ...]) -> Any:
    """Return zeros in the shape of a product or of attention; None where ``func`` is neither."""
    aten = torch.ops.aten
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        query = args[0]
        return torch.zeros_like(query), query.new_zeros(query.shape[:3], dtype=torch.float32)
    if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return tuple(torch.zeros_like(tensor) for tensor in args[1:4])
    if func in (aten.mm.default, aten.addmm.default):
        left, right = args[-2:]
        return left.new_zeros((left.shape[0], right.shape[1]))
    if func is aten.bmm.default:
        left, right = args
        return left.new_zeros((left.shape[0], left.shape[1], right.shape[2]))
    if func is aten.convolution.default and args[0].shape[2:] == args[1].shape[2:]:
        return args[0].new_zeros((args[0].shape[0], args[1].shape[0], *(1 for _ in args[0].shape[2:])))
    if func is aten.convolution_backward.default:
        outward, patches, weight = args[:3]
        wanted = (patches, weight, outward.new_zeros(weight.shape[0]))
        return tuple(
            tensor.new_zeros(tensor.shape) if is_wanted else None
            for tensor, is_wanted in zip(wanted, args[-1], strict=True)
        )
    return None


def measure_peak(work: Callable[[], Any], device: torch.device, *, skips_products: bool = False) -> int:
    """Run ``work`` and return the most bytes that it held at one time beside what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with MemoryMeter(skips_products=skips_products) as meter:
        work()
    return int(meter.peak_bytes)
