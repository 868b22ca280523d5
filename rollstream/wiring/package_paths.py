"""Where this program's packages lie, and what to do when another project has packages of the same names.

``configs``, ``learner`` and ``producers`` are common names: a folder that comes first on the path would hide
ours, in a program as in a role that it starts.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = ("broker_schemas", "configs", "consumers", "learner", "producers", "rollstream")


def hidden_packages() -> Iterator[tuple[str, Path, Path]]:
    """Yield (name, ours, theirs) of each package of ours that another one would be imported for."""
    for name in PACKAGES:
        loaded = sys.modules.get(name)
        found = getattr(loaded, "__file__", None) if loaded is not None else _first_on_path(name)
        ours = ROOT / name / "__init__.py"
        if found is not None and Path(found).resolve() != ours.resolve():
            yield name, ours, Path(found)


def _first_on_path(name: str) -> str | None:
    spec = importlib.machinery.PathFinder.find_spec(name)
    return spec.origin if spec is not None else None


def prefer_ours() -> None:
    """Put this program's packages first where others would hide them; for programs, not for libraries."""
    if any(hidden_packages()):
        sys.path.insert(0, str(ROOT))


def safe_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return ``environment`` (default: ours) for a Python that imports from where this one does.

    It does not look for modules in the working directory; a source tree that is not installed stays found.
    """
    given = dict(os.environ if environment is None else environment)
    given["PYTHONSAFEPATH"] = "1"
    if not {"site-packages", "dist-packages"} & set(ROOT.parts):
        rest = [part for part in given.get("PYTHONPATH", "").split(os.pathsep) if part and part != str(ROOT)]
        given["PYTHONPATH"] = os.pathsep.join([str(ROOT), *rest])
    return given
