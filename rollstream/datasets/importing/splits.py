"""Which split an image goes to: by the source's own names, or by a share and a seed. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from random import Random
from typing import Final

from rollstream.datasets.importing.drafts import ReadOptions

_WORDS: Final = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def named_split(name: str) -> str | None:
    """Return ``train``, ``val`` or ``test`` where a word of ``name`` says so; None for none or for several.

    Digits are no part of a word: ``instances_train2017`` is ``train``.
    """
    words = re.split(r"[^a-z]+", name.lower())
    found = {_WORDS[word] for word in words if word in _WORDS}
    return found.pop() if len(found) == 1 else None


def folder_split(path: PurePosixPath) -> str | None:
    """Return the split that a folder of ``path`` is named after, the innermost one; None for none."""
    for part in reversed(path.parent.parts):
        split = named_split(part)
        if split:
            return split
    return None


def seeded_split(names: Sequence[str], seed: int, val_share: float = 0.1) -> dict[str, str]:
    """Return ``train`` or ``val`` for each name; depends on the set of names, ``seed`` and share alone.

    At least one goes to ``val`` for a share over 0, and at least one to ``train``; a single name is training.
    """
    shuffled = sorted(set(names))
    Random(seed).shuffle(shuffled)
    num_val = max(1, round(val_share * len(shuffled))) if len(shuffled) > 1 and val_share > 0 else 0
    num_val = min(num_val, max(len(shuffled) - 1, 0))
    return {name: "val" if index < num_val else "train" for index, name in enumerate(shuffled)}


def choose_splits(names: Mapping[str, str | None], options: ReadOptions) -> dict[str, str]:
    """Return the split of each name; the values are the source's own word, None where it has none.

    Where some have one, the others are training. Where none has, or with ``options.is_resplit``, all are
    split by share and seed; ``group_by`` folder moves whole folders.
    """
    own = {name: split for name, split in names.items() if split is not None}
    if own and not options.is_resplit:
        return {name: own.get(name, "train") for name in names}
    if options.group_by == "folder":
        folder_of = {name: PurePosixPath(name).parent.as_posix() for name in names}
        by_folder = seeded_split(list(folder_of.values()), options.seed, options.val_share)
        return {name: by_folder[folder] for name, folder in folder_of.items()}
    return seeded_split(list(names), options.seed, options.val_share)
