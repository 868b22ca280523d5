"""The label that a rollout server keeps with its weights: which policy version, from which folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Final

LOADING: Final = "loading"


@dataclass(frozen=True, kw_only=True)
class WeightLabel:
    """Weights of ``policy_version`` from the folder ``weights_path``; written ``<version>:<path>``."""

    policy_version: int
    weights_path: str

    def __str__(self) -> str:
        return f"{self.policy_version}:{self.weights_path}"

    @property
    def family(self) -> str:
        """The folder of published versions, which tells one run's weights from another's."""
        return str(PurePath(self.weights_path).parent)

    def covers(self, wanted: WeightLabel) -> bool:
        """Return whether these are the ``wanted`` weights or later ones of the same run."""
        return self.family == wanted.family and self.policy_version >= wanted.policy_version


def parse_label(text: str) -> WeightLabel | None:
    """Return the label in ``text``; None for a server that has no weights of ours or is loading them."""
    policy_version, separator, weights_path = text.partition(":")
    if not separator or not weights_path or not policy_version.isdecimal():
        return None
    return WeightLabel(policy_version=int(policy_version), weights_path=weights_path)
