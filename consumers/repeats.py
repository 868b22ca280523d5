"""Which tokens of a rollout wrote an object once more.

Pure; it must not know losses. What a repeat is, `consumers.overlap_counts` says.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Final

import numpy as np

from consumers.parsing import ParsedRollout
from consumers.scanner import opening_offset, scan_payload
from consumers.token_bytes import token_bytes_of

_DESC: Final = re.compile(rb'"desc"[ \t\n\r]*:[ \t\n\r]*"((?:[^"\\]|\\.)*)"', re.DOTALL)


def repeat_tokens(parsed: ParsedRollout, repeats: Collection[int], tokenizer: Any) -> list[int]:
    """Return the tokens that wrote the objects at ``repeats``, as rising indices of ``prefix_ids``.

    They are coordinates and structure: all that lies between the end of the entry before and the end of the
    object's own, the comma by which the model went on included, but for tokens that hold a byte of its
    ``desc`` value or one past its end. No repeats give none.
    """
    if not repeats:
        return []
    data, ends = token_bytes_of(tokenizer).join(parsed.prefix_ids)
    data += parsed.open_tail.encode()
    opening = opening_offset(data)
    assert opening is not None, "a rollout with objects begins with a brace"
    scan = scan_payload(data, opening)
    wanted = {parsed.objects[index].number for index in repeats}
    found: list[int] = []
    gap_start = scan.opening_end
    for entry in scan.entries:
        # the first entry of a number is the valid one
        if entry.number in wanted:
            wanted.discard(entry.number)
            first = int(np.searchsorted(ends, gap_start, side="right"))
            last = int(np.searchsorted(ends, entry.value_end, side="right"))
            named = _DESC.search(data, entry.value_start, entry.value_end)
            assert named is not None, "a valid object has a desc"
            found += [i for i in range(first, last) if _is_outside(i, ends, named.start(1), named.end(1))]
        gap_start = entry.value_end
    return found


def _is_outside(index: int, ends: Any, start: int, end: int) -> bool:
    """Whether a token holds no byte of ``start:end``."""
    token_start = int(ends[index - 1]) if index else 0
    return int(ends[index]) <= start or token_start >= end
