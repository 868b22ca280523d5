"""Panels and dashboards as values, and their Grafana JSON. It must not know any metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

WIDTH: Final = 24
SCHEMA_VERSION: Final = 39
SHARED_CROSSHAIR: Final = 1
DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
RUNBOOK_FIELD: Final = "remedy"
Kind = Literal["timeseries", "stat", "bargauge", "table"]
Json = dict[str, Any]


@dataclass(frozen=True)
class Query:
    """One PromQL query and the legend of its series; ``is_limit``: a red dashed line, not to be crossed."""

    expr: str
    legend: str = "__auto"
    is_limit: bool = False

    def to_json(self, ref: str, kind: Kind) -> Json:
        """Return the target; a table shows what is now, a row for each series."""
        told: Json = {"refId": ref, "expr": self.expr, "legendFormat": self.legend}
        return told | ({"format": "table", "instant": True} if kind == "table" else {})


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel. ``unit`` is Grafana's id; ``steps`` are (from value on, color), the first from None on.

    ``remedies``: what is shown in the column ``remedy`` of a table, by its value; it links to the runbook.
    """

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
    remedies: Mapping[str, str] = field(default_factory=dict)

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
            "targets": [query.to_json(ref, self.kind) for ref, query in self._by_ref()],
            "fieldConfig": {
                "defaults": {key: value for key, value in defaults.items() if value is not None},
                "overrides": [_limit_line(ref) for ref, query in self._by_ref() if query.is_limit]
                + ([_remedy_column(self.remedies)] if self.remedies else []),
            },
            "options": _OPTIONS[self.kind],
            **({"transformations": [_WITHOUT_TIME]} if self.kind == "table" else {}),
        }

    def _by_ref(self) -> list[tuple[str, Query]]:
        return [(chr(ord("A") + at), query) for at, query in enumerate(self.queries)]


def _limit_line(ref: str) -> Json:
    style = {"fill": "dash", "dash": [10, 10]}
    return {
        "matcher": {"id": "byFrameRefID", "options": ref},
        "properties": [
            {"id": "color", "value": {"mode": "fixed", "fixedColor": "red"}},
            {"id": "custom.lineStyle", "value": style},
            {"id": "custom.fillOpacity", "value": 0},
            {"id": "custom.stacking", "value": {"mode": "none"}},
        ],
    }


def _remedy_column(remedies: Mapping[str, str]) -> Json:
    shown = {name: {"text": text, "index": at} for at, (name, text) in enumerate(sorted(remedies.items()))}
    return {
        "matcher": {"id": "byName", "options": RUNBOOK_FIELD},
        "properties": [
            {"id": "mappings", "value": [{"type": "value", "options": shown}]},
            {"id": "custom.width", "value": 900},
            {"id": "links", "value": [{"title": "Runbook", "url": "${runbook}", "targetBlank": True}]},
        ],
    }


_WITHOUT_TIME: Final[Json] = {
    "id": "organize",
    "options": {"excludeByName": {"Time": True, "Value": True}, "indexByName": {}, "renameByName": {}},
}

_OPTIONS: Final[dict[Kind, Json]] = {
    "timeseries": {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "mean", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "background", "graphMode": "area"},
    "bargauge": {"reduceOptions": {"calcs": ["lastNotNull"]}, "displayMode": "lcd"},
    "table": {"showHeader": True},
}


@dataclass(frozen=True)
class Row:
    """A headed row of panels; they wrap where they do not fit. ``each``: a row for each value of it."""

    title: str
    panels: tuple[Panel, ...]
    each: str = ""


@dataclass(frozen=True)
class Choice:
    """A variable: values of a label of a series. ``takes_all``: several at once, all of them at first."""

    name: str
    title: str
    series: str
    label: str
    takes_all: bool = False

    def to_json(self) -> Json:
        """Return Grafana's variable, looked up anew at every change of the time range."""
        every = {"multi": True, "includeAll": True, "current": _ALL} if self.takes_all else {}
        query = {"query": f"label_values({self.series}, {self.label})", "refId": self.name}
        told = {"name": self.name, "label": self.title, "type": "query", "datasource": DATASOURCE}
        return told | {"query": query, "refresh": 2, "sort": 1} | every


_ALL: Final = {"text": ["All"], "value": ["$__all"]}


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """A dashboard of one run, chosen by the variable ``run``; ``choices`` and ``shifts`` are others.

    ``shifts``: how far back another run is looked at, the first to begin with; the variable ``shift``.
    """

    uid: str
    title: str
    meaning: str
    rows: tuple[Row, ...] = field(default=())
    choices: tuple[Choice, ...] = ()
    shifts: tuple[str, ...] = ()

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
            "templating": {"list": self._variables()},
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
            ]
            + [{"type": "link", "title": "Runbook", "url": "${runbook}", "targetBlank": True}],
            "panels": list(self._placed()),
        }

    def _variables(self) -> list[Json]:
        choices = [choice.to_json() for choice in self.choices]
        return [_SOURCE, RUN.to_json(), *choices, *([_shift(self.shifts)] if self.shifts else []), _RUNBOOK]

    def _placed(self) -> Iterator[Json]:
        number, top = 0, 0
        for row in self.rows:
            number += 1
            yield _row_json(row, number, top)
            top, left, tallest = top + 1, 0, 0
            for panel in row.panels:
                if left + panel.width > WIDTH:
                    top, left, tallest = top + tallest, 0, 0
                number += 1
                yield panel.to_json(number, left, top)
                left, tallest = left + panel.width, max(tallest, panel.height)
            top += tallest


def _row_json(row: Row, number: int, top: int) -> Json:
    place = {"x": 0, "y": top, "w": WIDTH, "h": 1}
    told = {
        "id": number,
        "type": "row",
        "title": row.title,
        "collapsed": False,
        "gridPos": place,
        "panels": [],
    }
    return told | ({"repeat": row.each} if row.each else {})


def _shift(shifts: Sequence[str]) -> Json:
    chosen = {"text": shifts[0], "value": shifts[0]}
    return {
        "name": "shift",
        "label": "Seen so long before",
        "type": "custom",
        "query": ",".join(shifts),
        "current": chosen,
        "options": [{"text": shift, "value": shift, "selected": shift == shifts[0]} for shift in shifts],
    }


RUN: Final = Choice("run", "Run", "rollstream_broker_up", "run")
# compose puts the runbook there; another Grafana is told where it stands
RUNBOOK_ADDRESS: Final = "/public/rollstream/runbook.txt"
_SOURCE: Final[Json] = {
    "name": "datasource",
    "label": "Data source",
    "type": "datasource",
    "query": "prometheus",
}
_RUNBOOK: Final[Json] = {
    "name": "runbook",
    "label": "Runbook",
    "type": "textbox",
    "query": RUNBOOK_ADDRESS,
    "current": {"text": RUNBOOK_ADDRESS, "value": RUNBOOK_ADDRESS},
}
_ALERTS: Final[Json] = {
    "name": "Alerts",
    "enable": True,
    "datasource": DATASOURCE,
    "expr": 'ALERTS{alertstate="firing", run="$run"}',
    "titleFormat": "{{alertname}}",
    "iconColor": "red",
}
