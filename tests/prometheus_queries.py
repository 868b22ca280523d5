"""Reads the queries of dashboards and rules: which metrics they name, and the parts of an alert."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import yaml

from tests.source_tree import ROOT

_PROMETHEUS: Final = ROOT / "grafana" / "prometheus"
_LABEL_LISTS: Final = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)")
_WORDS: Final = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
_NAME: Final = re.compile(r"(?<![\w:.$])[a-zA-Z_:][\w:]*(?!\w*\s*\()")
_CONDITION: Final = re.compile(r"^(.+?) (<=|>=|<|>|==|!=) (?:on \(\w+\) )?(.+)$")


def metric_names(expr: str) -> set[str]:
    """Return the metrics that a PromQL expression names."""
    bare = re.sub(r'"[^"]*"', '""', expr)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    bare = _LABEL_LISTS.sub(" ", bare)
    return {name for name in _NAME.findall(bare) if name not in _WORDS and not re.fullmatch(r"e\d*", name)}


def dashboard_queries(dashboard: Mapping[str, Any]) -> Iterator[str]:
    """Yield every query of a dashboard's JSON: panels, annotations and the variable."""
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))


def _rules(name: str) -> list[dict[str, Any]]:
    content = yaml.safe_load((_PROMETHEUS / name).read_text("utf-8"))
    return [rule for group in content["groups"] for rule in group["rules"]]


def recording_rules() -> list[dict[str, Any]]:
    return _rules("recording.yml")


def alerts() -> list[dict[str, Any]]:
    return _rules("alerts.yml")


def recorded_names() -> set[str]:
    return {rule["record"] for rule in recording_rules()}


def alert_conditions(expr: str) -> Iterator[str]:
    """Yield the sides of an alert's comparisons that are queries: they must have a value at any time."""
    for part in expr.split(" and on (run) "):
        found = _CONDITION.match(part.strip())
        assert found, f"not of the form 'series comparison value': {part}"
        for side in (found[1], found[3]):
            if not re.fullmatch(r"[\d.]+", side):
                yield side
