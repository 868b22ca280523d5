"""The files that are written from code: dashboards and the metrics table. A test holds them to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from rollstream.watch.dashboards.learning import LEARNING
from rollstream.watch.dashboards.overview import OVERVIEW
from rollstream.watch.dashboards.queue import QUEUE
from rollstream.watch.metrics_table import markdown_table

DASHBOARDS: Final = {"overview": OVERVIEW, "queue": QUEUE, "learning": LEARNING}
METRICS_PAGE: Final = Path("docs/METRICS.md")


def dashboard_files() -> dict[Path, str]:
    """Return path and text of each dashboard."""
    every = tuple(DASHBOARDS.values())
    return {
        Path(f"grafana/dashboards/{name}.json"): json.dumps(dashboard.to_json(every), indent=1) + "\n"
        for name, dashboard in DASHBOARDS.items()
    }


def generated_files() -> dict[Path, str]:
    """Return path (relative to the project's root) and text of every file written from code."""
    return dashboard_files() | {METRICS_PAGE: markdown_table()}


def outdated_files(root: Path) -> list[Path]:
    """Return the files below ``root`` that are missing or differ from what the code writes."""
    return [path for path, text in generated_files().items() if _stored(root / path) != text]


def write_generated(root: Path) -> list[Path]:
    """Write what differs below ``root``; return those paths."""
    old = outdated_files(root)
    for path in old:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(generated_files()[path], encoding="utf-8")
    return old


def _stored(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None
