"""The grid of a sweep: from the text of a grid file to cells of overrides. Pure."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import yaml

from broker_schemas.errors import ConfigError

Scalar = str | int | float | bool
Settings = tuple[tuple[str, Scalar], ...]
LARGEST_NUM_CELLS: Final = 1000
LONGEST_RUN_NAME: Final = 64
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./+-]+")
_BLOCK_KEYS: Final = {"title", "product", "cells", "set"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep: ``values`` of the block's keys, in their order, and what the block sets besides."""

    values: Settings
    fixed: Settings = ()

    @property
    def overrides(self) -> tuple[str, ...]:
        """The overrides as the command line takes them; the block's come first, so that values win."""
        return tuple(f"{key}={yaml_text(value)}" for key, value in (*self.fixed, *self.values))

    @property
    def label(self) -> str:
        """The values alone, as a table shows them: ``0.05``, ``1 / 2``."""
        return " / ".join(yaml_text(value) for _, value in self.values)

    @property
    def name(self) -> str:
        """Keys and values as one word of a-z, 0-9 and hyphens: ``b-ratio-0-05``."""
        return slug(" ".join(f"{short_key(key)} {yaml_text(value)}" for key, value in self.values))


@dataclass(frozen=True, kw_only=True)
class Block:
    """Cells that belong together: they differ in ``keys``. ``is_product``: every value meets every other."""

    title: str
    keys: tuple[str, ...]
    is_product: bool
    cells: tuple[Cell, ...]

    @property
    def axis(self) -> str:
        """The short names of the keys, in the order of a cell's label."""
        return " / ".join(short_key(key) for key in self.keys)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All blocks of a sweep, in the order in which they are run."""

    blocks: tuple[Block, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(cell for block in self.blocks for cell in block.cells)


def parse_grid(text: str, where: str) -> Grid:
    """Return the grid in the text of a grid file; ``where`` is its name in messages.

    Raises ConfigError for what is no grid, for no cell at all, for more than LARGEST_NUM_CELLS and for two
    cells of the same name.
    """
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise ConfigError(f"{where}: not readable as YAML: {' '.join(str(exc).split())}") from exc
    listed = tree.get("blocks") if isinstance(tree, Mapping) else None
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"{where}: got no list under 'blocks', expected at least one block of cells")
    blocks = tuple(_block(item, f"{where}: blocks[{index}]") for index, item in enumerate(listed))
    _check_cells(blocks, where)
    return Grid(blocks=blocks)


def run_name(sweep_name: str, cell: Cell) -> str:
    """Return the name of a cell's run: at most LONGEST_RUN_NAME characters, cut ones end in a digest."""
    name = slug(f"{sweep_name} {cell.name}")
    if len(name) <= LONGEST_RUN_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:10]
    return f"{name[: LONGEST_RUN_NAME - len(digest) - 1].rstrip('-')}-{digest}"


def short_key(key: str) -> str:
    """Return the last part of a key: ``b_ratio`` of ``stage2_ab.schedule.b_ratio``."""
    return key.rpartition(".")[2]


def slug(text: str) -> str:
    """Return ``text`` in a-z, 0-9 and inner hyphens; a minus before a digit is written ``m``."""
    signed = re.sub(r"(?<![A-Za-z0-9])-(?=[\d.])", "m", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", signed).strip("-")


def yaml_text(value: Scalar) -> str:
    """Return the text on one line that an override reads back as the same value."""
    is_quoted = isinstance(value, str) and not _PLAIN.fullmatch(value)
    text = yaml.safe_dump(value, default_style='"' if is_quoted else None, width=math.inf)
    return text.removesuffix("...\n").strip()


def _block(item: object, where: str) -> Block:
    if not isinstance(item, Mapping):
        raise ConfigError(f"{where}: got {type(item).__name__}, expected a map with 'product' or 'cells'")
    unknown = sorted(str(key) for key in item if key not in _BLOCK_KEYS)
    if unknown or ("product" in item) == ("cells" in item):
        raise ConfigError(
            f"{where}: got {', '.join(unknown) or 'both or neither of product and cells'}, expected "
            "'product' (key: list of values) or 'cells' (list of maps), with 'title' and 'set' beside it"
        )
    fixed = _settings(item.get("set", {}), f"{where}.set", may_be_empty=True)
    is_product = "product" in item
    found = list(
        _crossed(item["product"], f"{where}.product")
        if is_product
        else _listed(item["cells"], f"{where}.cells")
    )
    keys = tuple(key for key, _ in found[0])
    title = item.get("title")
    return Block(
        title=str(title) if title else " by ".join(short_key(key) for key in keys),
        keys=keys,
        is_product=is_product,
        cells=tuple(Cell(values=values, fixed=fixed) for values in found),
    )


def _crossed(item: object, where: str) -> Iterator[Settings]:
    """Yield every combination, the last key changing fastest."""
    if not isinstance(item, Mapping) or not item:
        raise ConfigError(f"{where}: got {item!r}, expected a map of key to list of values")
    for key, values in item.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}.{key}: got {values!r}, expected a list of at least one value")
    lists = [
        [(_key(key, where), _scalar(value, f"{where}.{key}")) for value in values]
        for key, values in item.items()
    ]
    yield from itertools.product(*lists)


def _listed(item: object, where: str) -> Iterator[Settings]:
    if not isinstance(item, list) or not item:
        raise ConfigError(f"{where}: got {item!r}, expected a list of at least one map of key to value")
    cells = [_settings(cell, f"{where}[{index}]") for index, cell in enumerate(item)]
    for index, cell in enumerate(cells):
        if [key for key, _ in cell] != [key for key, _ in cells[0]]:
            raise ConfigError(
                f"{where}[{index}]: got the keys {', '.join(key for key, _ in cell)}, expected those of the "
                f"first cell in the same order: {', '.join(key for key, _ in cells[0])}"
            )
    yield from cells


def _settings(item: object, where: str, *, may_be_empty: bool = False) -> Settings:
    if not isinstance(item, Mapping) or not (item or may_be_empty):
        raise ConfigError(f"{where}: got {item!r}, expected a map of key to value")
    return tuple((_key(key, where), _scalar(value, f"{where}.{key}")) for key, value in item.items())


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str) or not all(part.strip() for part in key.split(".")) or "=" in key:
        raise ConfigError(f"{where}: got the key {key!r}, expected section.key of a configuration")
    return key


def _scalar(value: object, where: str) -> Scalar:
    if not isinstance(value, str | int | float | bool):
        raise ConfigError(f"{where}: got {value!r}, expected a number, a text, true or false")
    return value


def _check_cells(blocks: tuple[Block, ...], where: str) -> None:
    names = Counter(cell.name for block in blocks for cell in block.cells)
    if names.total() > LARGEST_NUM_CELLS:
        raise ConfigError(f"{where}: got {names.total()} cells, expected at most {LARGEST_NUM_CELLS}")
    twice = [name for name, amount in names.items() if amount > 1]
    if twice:
        raise ConfigError(
            f"{where}: got {', '.join(twice)} more than once, expected every cell once; "
            "cells that differ only in 'set' need a value that tells them apart"
        )
