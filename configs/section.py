"""The base of every section of the configuration tree, and the value types that sections share."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

MAX_RATIO_DIGITS = 18


class Section(BaseModel):
    """Frozen, strict about types, refuses unknown keys; the docstring under a field is its description."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


def exact_decimal(value: Any) -> Decimal:
    """Read a decimal exactly as written: text, whole number or Decimal; a float by its shortest text.

    Raises `ValueError` for anything that is no finite decimal of at most 18 digits after the point.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise ValueError("expected a decimal number such as 0.29")
    try:
        number = Decimal(repr(value) if isinstance(value, float) else value)
    except InvalidOperation as exc:
        raise ValueError("expected a decimal number such as 0.29") from exc
    exponent = number.as_tuple().exponent
    if not isinstance(exponent, int):
        raise ValueError("expected a finite decimal number such as 0.29")
    if not -MAX_RATIO_DIGITS <= exponent <= MAX_RATIO_DIGITS:
        raise ValueError(f"expected at most {MAX_RATIO_DIGITS} digits after the point")
    return number


Ratio = Annotated[
    Decimal,
    BeforeValidator(exact_decimal),
    Field(ge=0, le=1),
    WithJsonSchema({"type": ["number", "string"], "minimum": 0, "maximum": 1}),
]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
GpuSet = Annotated[tuple[CountOrZero, ...], Field(strict=False)]
