"""The pages of docs/ that come from code: commands, keys, metrics, library names; and the dashboards."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from configs.show import markdown_table as key_table
from rollstream.watch.dashboards import dashboard_files
from rollstream.watch.metrics_table import markdown_table as metrics_table

LIBRARY: Final = (
    ("broker_schemas.broker.broker", "Broker"),
    ("broker_schemas.client", "SegmentSink"),
    ("broker_schemas.client", "PackFeed"),
    ("broker_schemas.torch_dataset", "PackDataset"),
    ("broker_schemas.records.records", "SegmentRecord"),
    ("broker_schemas.records.records", "MatchedSegment"),
    ("broker_schemas.records.packs", "ReadyPack"),
    ("configs", "load_config"),
    ("rollstream.datasets.importing", "import_dataset"),
    ("rollstream.commands.from_python", "new_run"),
    ("rollstream.commands.from_python", "learn"),
    ("rollstream.commands.from_python", "up"),
    ("rollstream.evaluation.evaluating", "evaluate"),
    ("rollstream.commands.predicting", "predict"),
)
_COMMANDS_HEAD: Final = """# Commands

Written from the program by `rollstream dashboards`; `rollstream COMMAND --help` shows the options.

| command | does |
|---|---|
"""
_API_HEAD: Final = """# Library doors

Written from the docstrings by `rollstream dashboards`.
`import rollstream` offers `SegmentSink`, `PackFeed`, `PackDataset`, `load_config`, `import_dataset`,
`new_run`, `learn`, `up`, `evaluate` and `predict`; nothing is imported before it is used.
Used whole: [photographs.ipynb](examples/photographs.ipynb) goes from photographs to drawn predictions,
[push_from_sampler.py](examples/push_from_sampler.py) pushes rollouts,
[train_from_packs.py](examples/train_from_packs.py) trains from packs.
"""


def command_table(program: Any) -> str:
    """Return the text of docs/COMMANDS.md: every command of a click program, with its first sentence."""
    rows = (
        f"| `rollstream {name}` | {' '.join(command.help.split(chr(10) * 2)[0].split())} |\n"
        for name, command in _commands(program, "")
    )
    return _COMMANDS_HEAD + "".join(rows)


def _commands(group: Any, start: str) -> Iterator[tuple[str, Any]]:
    for name, command in sorted(getattr(group, "commands", {}).items()):
        if hasattr(command, "commands"):
            yield from _commands(command, f"{start}{name} ")
            continue
        arguments = [
            str(parameter.name).upper() + ("…" if parameter.nargs == -1 else "")
            for parameter in command.params
            if parameter.param_type_name == "argument" and parameter.required
        ]
        yield " ".join([f"{start}{name}", *arguments]), command


def library_page() -> str:
    """Return the text of docs/API.md: each library name with its signature, docstring and public methods."""
    parts = [_API_HEAD]
    for module, name in LIBRARY:
        found = getattr(importlib.import_module(module), name)
        parts.append(f"\n## `{module}.{name}`\n\n{_described(name, found)}")
        if inspect.isclass(found):
            parts += [
                f"\n### `{method}`\n\n{_described(method, function)}"
                for method, function in vars(found).items()
                if not method.startswith("_") and inspect.isfunction(function) and function.__doc__
            ]
    return "".join(parts)


def _described(name: str, found: Any) -> str:
    try:
        signature = str(inspect.signature(found)).replace("'", "")
    except (TypeError, ValueError):
        signature = "(…)"
    return f"```python\n{name}{signature}\n```\n\n{inspect.getdoc(found) or ''}\n"


def generated_files(program: Any) -> dict[Path, str]:
    """Return path (relative to the project's root) and text of every file written from code."""
    return dashboard_files() | {
        Path("docs/METRICS.md"): metrics_table(),
        Path("docs/CONFIG.md"): key_table(),
        Path("docs/COMMANDS.md"): command_table(program),
        Path("docs/API.md"): library_page(),
    }


def outdated_files(program: Any, root: Path) -> dict[Path, str]:
    """Return path and wanted text of each file below ``root`` that is missing or differs."""
    texts = generated_files(program)
    return {path: text for path, text in texts.items() if _stored(root / path) != text}


def write_generated(program: Any, root: Path) -> list[Path]:
    """Write what differs below ``root``; return those paths."""
    outdated = outdated_files(program, root)
    for path, text in outdated.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return list(outdated)


def _stored(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None
