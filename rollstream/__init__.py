"""The operator's front door: command line, local stack, report, live view, inspection; and the library doors.

``import rollstream`` loads nothing but this; a door is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from broker_schemas.client import PackFeed, SegmentSink
    from broker_schemas.torch_dataset import PackDataset
    from configs import load_config
    from rollstream.commands.from_python import learn, new_run, up
    from rollstream.commands.predicting import predict
    from rollstream.datasets.importing import import_dataset
    from rollstream.evaluation.evaluating import evaluate

__all__ = [
    "PackDataset",
    "PackFeed",
    "SegmentSink",
    "evaluate",
    "import_dataset",
    "learn",
    "load_config",
    "new_run",
    "predict",
    "up",
]

_DOORS: Final = {
    "SegmentSink": "broker_schemas.client",
    "PackFeed": "broker_schemas.client",
    "PackDataset": "broker_schemas.torch_dataset",
    "load_config": "configs",
    "evaluate": "rollstream.evaluation.evaluating",
    "import_dataset": "rollstream.datasets.importing",
    "new_run": "rollstream.commands.from_python",
    "learn": "rollstream.commands.from_python",
    "up": "rollstream.commands.from_python",
    "predict": "rollstream.commands.predicting",
}


def __getattr__(name: str) -> Any:
    """Load a library door; raises ImportError in one line where another project's package hides ours."""
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from rollstream.wiring.package_paths import hidden_packages

    for package, ours, theirs in hidden_packages():
        raise ImportError(
            f"rollstream needs its package {package!r} at {ours.parent}, but {theirs} comes first on the "
            "path; rename that one, or start Python where it is not on the path"
        )
    return getattr(import_module(_DOORS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_DOORS])
