"""The dashboards as files. A test holds the files to the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from rollstream.watch.dashboards.comparison import COMPARISON
from rollstream.watch.dashboards.learning import LEARNING
from rollstream.watch.dashboards.overview import OVERVIEW
from rollstream.watch.dashboards.processes import PROCESSES
from rollstream.watch.dashboards.queue import QUEUE

DASHBOARDS: Final = {
    "overview": OVERVIEW,
    "queue": QUEUE,
    "learning": LEARNING,
    "processes": PROCESSES,
    "comparison": COMPARISON,
}


def dashboard_files() -> dict[Path, str]:
    """Return path and text of each dashboard."""
    every = tuple(DASHBOARDS.values())
    return {
        Path(f"grafana/dashboards/{name}.json"): json.dumps(dashboard.to_json(every), indent=1) + "\n"
        for name, dashboard in DASHBOARDS.items()
    }
