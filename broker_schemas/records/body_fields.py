"""Typed reading of a decoded body: each method returns a checked value or raises MalformedRecord."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from broker_schemas.errors import MalformedRecord
from broker_schemas.records import codec

T = TypeVar("T")
C = TypeVar("C", bound=str)
INT_HIGH: Final = (1 << 63) - 1
MAX_TOKENS: Final = 1 << 21
MAX_ITEMS: Final = 1 << 16
_REQUIRED: Final = object()


class BodyReader:
    """Reads fields of one map; ``where`` names the record in messages."""

    def __init__(self, body: Mapping[str, Any], where: str) -> None:
        if not isinstance(body, Mapping):
            raise MalformedRecord(f"{where}: got {type(body).__name__}, expected a map")
        self._body = body
        self._where = where

    def _get(self, name: str, default: object) -> Any:
        if name in self._body:
            return self._body[name]
        if default is _REQUIRED:
            raise MalformedRecord(f"{self._where}: field {name!r} is missing")
        return default

    def _wrong(self, name: str, value: object, expected: str) -> MalformedRecord:
        return MalformedRecord(f"{self._where}.{name}: got {value!r:.80}, expected {expected}")

    def text(
        self, name: str, *, default: object = _REQUIRED, empty_allowed: bool = False, max_chars: int = 4096
    ) -> str:
        value = self._get(name, default)
        if not isinstance(value, str) or len(value) > max_chars or not (value or empty_allowed):
            raise self._wrong(name, value, f"text of {0 if empty_allowed else 1} to {max_chars} characters")
        return value

    def integer(self, name: str, *, low: int, high: int = INT_HIGH, default: object = _REQUIRED) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(name, value, f"an integer from {low} to {high}")
        return value

    def choice(self, name: str, choices: tuple[C, ...], *, default: object = _REQUIRED) -> C:
        value = self._get(name, default)
        for option in choices:
            if value == option:
                return option
        raise self._wrong(name, value, " or ".join(choices))

    def int_list(self, name: str, *, low: int, high: int, at_most: int = MAX_ITEMS) -> list[int]:
        value = self._get(name, _REQUIRED)
        fits = isinstance(value, list) and len(value) <= at_most
        if not fits or not all(type(item) is int and low <= item <= high for item in value):
            raise self._wrong(name, value, f"a list of at most {at_most} integers from {low} to {high}")
        return list(value)

    def items(
        self, name: str, read: Callable[[Mapping[str, Any], str], T], *, at_most: int = MAX_ITEMS
    ) -> tuple[T, ...]:
        value = self._get(name, _REQUIRED)
        if not isinstance(value, list) or len(value) > at_most:
            got = f"{len(value)} items" if isinstance(value, list) else type(value).__name__
            raise self._wrong(name, got, f"a list of at most {at_most} maps")
        return tuple(read(item, f"{self._where}.{name}[{index}]") for index, item in enumerate(value))

    def pairs(self, name: str) -> tuple[tuple[int, int], ...]:
        value = self._get(name, [])
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            raise self._wrong(name, value, "a list of pairs")
        for pair in value:
            if (
                not isinstance(pair, list)
                or len(pair) != 2
                or not all(type(n) is int and n >= 0 for n in pair)
            ):
                raise self._wrong(name, pair, "a pair of integers >= 0")
        return tuple((pair[0], pair[1]) for pair in value)

    def counts(self, name: str) -> dict[str, int]:
        value = self._get(name, {})
        if not isinstance(value, dict) or len(value) > MAX_ITEMS:
            raise self._wrong(name, value, "a map of counts")
        if not all(
            isinstance(key, str) and type(count) is int and count >= 0 for key, count in value.items()
        ):
            raise self._wrong(name, value, "a map from text to integers >= 0")
        return dict(value)

    def token_ids(self, name: str) -> NDArray[np.int32]:
        ids = codec.decode_array(self._get(name, _REQUIRED), "<i4", field=f"{self._where}.{name}")
        if len(ids) > MAX_TOKENS:
            raise MalformedRecord(
                f"{self._where}.{name}: got {len(ids)} tokens, expected at most {MAX_TOKENS}"
            )
        if len(ids) and int(ids.min()) < 0:
            raise MalformedRecord(f"{self._where}.{name}: got a negative token id {int(ids.min())}")
        return ids
