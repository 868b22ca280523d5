"""What a tokenizer does where an answer goes on or ends: at the join of a kept rollout and what is appended.

Owns the look at one tokenizer; it must not know records or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from broker_schemas.method.coordinates import CoordVocabulary
from broker_schemas.method.payload import render_payload
from broker_schemas.records.records import GroundTruthObject
from consumers.fragments import encode_fragment
from consumers.parsing import parse_rollout
from consumers.token_bytes import token_bytes_of

_BOX: Final = GroundTruthObject(desc="red car", geometry="bbox_2d", bins=(1, 20, 300, 400))
_POLYGON: Final = GroundTruthObject(desc="leaf", geometry="poly", bins=(1, 2, 30, 4, 15, 60))
_SAMPLES: Final = ((_BOX, _BOX), (_POLYGON, _BOX), (_BOX, _POLYGON), (_POLYGON, _POLYGON))


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinReport:
    """``going_on`` and ``ending`` are the token texts after the last coordinate of a box, up to the decision.

    ``differing`` are payloads (as text) whose tokens change when they are cut after an object and made whole
    again: there training would show tokens that the model never writes.
    """

    going_on: tuple[str, ...]
    ending: tuple[str, ...]
    differing: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        return not self.differing

    def describe(self) -> str:
        """Return one line for people."""
        on, end = (" ".join(texts) for texts in (self.going_on, self.ending))
        return f"after a box goes on with {on} and ends with {end}"


def examine_join(tokenizer: Any, coord_vocab: CoordVocabulary) -> JoinReport:
    """Return what ``tokenizer`` writes at the join, on boxes and polygons; raises FragmentNotEncoded."""
    table = token_bytes_of(tokenizer)
    differing = [
        render_payload(objects).text
        for objects in _SAMPLES
        for num_kept in range(len(objects) + 1)
        if not _is_same(objects, num_kept, tokenizer, coord_vocab)
    ]
    one, two = (_ids([_BOX] * count, tokenizer) for count in (1, 2))
    shared = next(i for i, (left, right) in enumerate(zip(one, two, strict=False)) if left != right)
    start = 1 + max(i for i, token_id in enumerate(one) if token_id in coord_vocab.bin_by_id)
    return JoinReport(
        going_on=_texts(two[start : shared + 1], table),
        ending=_texts(one[start : shared + 1], table),
        differing=tuple(dict.fromkeys(differing)),
    )


def _is_same(
    objects: Sequence[GroundTruthObject], num_kept: int, tokenizer: Any, coord_vocab: CoordVocabulary
) -> bool:
    whole = _ids(objects, tokenizer)
    said = _ids(objects[:num_kept], tokenizer)
    parsed = parse_rollout(said, tokenizer, coord_vocab)
    fragment = encode_fragment(parsed, objects[num_kept:], tokenizer, coord_vocab)
    return [*parsed.prefix_ids, *fragment.ids.tolist()] == whole


def _ids(objects: Sequence[GroundTruthObject], tokenizer: Any) -> list[int]:
    encoded = token_bytes_of(tokenizer).encode(render_payload(objects).text)
    return [] if encoded is None else encoded[0]


def _texts(ids: Sequence[int], table: Any) -> tuple[str, ...]:
    return tuple(f"`{table.text([token_id])}`" for token_id in ids)
