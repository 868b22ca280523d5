"""Panels and dashboards as values, and their Grafana JSON. It must not know any metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

WIDTH: Final = 24
SCHEMA_VERSION: Final = 39
SHARED_CROSSHAIR: Final = 1
DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
Kind = Literal["timeseries", "stat", "bargauge"]
Json = dict[str, Any]


@dataclass(frozen=True)
class Query:
    """One PromQL query and the legend of its series."""

    expr: str
    legend: str = "__auto"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel. ``unit`` is Grafana's id; ``steps`` are (from value on, color), the first from None on."""

    title: str
    meaning: str
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    unit: str = "short"
    width: int = 8
    height: int = 7
    steps: tuple[tuple[float | None, str], ...] = ((None, "green"),)
    is_stacked: bool = False
    highest: float | None = None

    def to_json(self, number: int, left: int, top: int) -> Json:
        """Return the panel at a place of the grid."""
        custom: Json = {"stacking": {"mode": "normal" if self.is_stacked else "none"}, "fillOpacity": 10}
        defaults: Json = {
            "unit": self.unit,
            "min": 0 if self.unit != "none" else None,
            "max": self.highest,
            "thresholds": {
                "mode": "absolute",
                "steps": [{"value": value, "color": color} for value, color in self.steps],
            },
        }
        if self.kind == "timeseries":
            if len(self.steps) > 1:  # each value from which on it is bad is a line
                custom["thresholdsStyle"] = {"mode": "line"}
            defaults["custom"] = custom
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.meaning,
            "datasource": DATASOURCE,
            "gridPos": {"x": left, "y": top, "w": self.width, "h": self.height},
            "targets": [
                {"refId": chr(ord("A") + at), "expr": query.expr, "legendFormat": query.legend}
                for at, query in enumerate(self.queries)
            ],
            "fieldConfig": {
                "defaults": {key: value for key, value in defaults.items() if value is not None},
                "overrides": [],
            },
            "options": _OPTIONS[self.kind],
        }


_OPTIONS: Final[dict[Kind, Json]] = {
    "timeseries": {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "mean", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "background", "graphMode": "area"},
    "bargauge": {"reduceOptions": {"calcs": ["lastNotNull"]}, "displayMode": "lcd"},
}


@dataclass(frozen=True)
class Row:
    """A headed row of panels; they wrap where they do not fit."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """A dashboard of one run, chosen by the variable ``run``."""

    uid: str
    title: str
    meaning: str
    rows: tuple[Row, ...] = field(default=())

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row.panels)

    def to_json(self, others: Sequence[Dashboard] = ()) -> Json:
        """Return Grafana's JSON, with links to the other dashboards; no id, no time of writing."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.meaning,
            "tags": ["rollstream"],
            "schemaVersion": SCHEMA_VERSION,
            "editable": False,
            "graphTooltip": SHARED_CROSSHAIR,
            "refresh": "5s",
            "time": {"from": "now-30m", "to": "now"},
            "templating": {"list": _VARIABLES},
            "annotations": {"list": [_ALERTS]},
            "links": [
                {
                    "type": "link",
                    "title": other.title,
                    "url": f"/d/{other.uid}",
                    "keepTime": True,
                    "includeVars": True,
                }
                for other in others
                if other.uid != self.uid
            ],
            "panels": list(self._placed()),
        }

    def _placed(self) -> Iterator[Json]:
        number, top = 0, 0
        for row in self.rows:
            number += 1
            yield _row_json(row.title, number, top)
            top, left, tallest = top + 1, 0, 0
            for panel in row.panels:
                if left + panel.width > WIDTH:
                    top, left, tallest = top + tallest, 0, 0
                number += 1
                yield panel.to_json(number, left, top)
                left, tallest = left + panel.width, max(tallest, panel.height)
            top += tallest


def _row_json(title: str, number: int, top: int) -> Json:
    place = {"x": 0, "y": top, "w": WIDTH, "h": 1}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


_VARIABLES: Final[list[Json]] = [
    {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
    {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": "label_values(rollstream_broker_up, run)", "refId": "run"},
        "refresh": 2,
        "sort": 1,
    },
]
_ALERTS: Final[Json] = {
    "name": "Alerts",
    "enable": True,
    "datasource": DATASOURCE,
    "expr": 'ALERTS{alertstate="firing", run="$run"}',
    "titleFormat": "{{alertname}}",
    "iconColor": "red",
}
