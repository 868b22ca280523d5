"""An evaluation for a terminal: numbers for any class and for the right one side by side [U-5]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from broker_schemas.method.evaluation_numbers import GATE, NUMBERS, PREFIX
from rollstream.evaluation.evaluation import Evaluation

MOST_CLASSES: Final = 20
_NOT_THERE: Final = "–"
# what a row says, its number for any class, its number for the right class
_ROWS: Final = (
    (f"F1 at IoU {GATE}", "f1", "f1_class"),
    ("F1 at IoU 0.5", "f1_50", "f1_class_50"),
    ("F1 at IoU 0.95", "f1_95", "f1_class_95"),
    ("F1, mean over IoU 0.5 to 0.95", "f1_miou", "f1_class_miou"),
    ("precision at IoU 0.5", "precision_50", "precision_class_50"),
    ("recall at IoU 0.5", "recall_50", "recall_class_50"),
    ("COCO AP50", "map_50_class_agnostic", "map_50"),
    ("COCO AP", "map_class_agnostic", "map"),
)
_ALONE: Final = (
    "label_accuracy",
    "samples",
    "gt_objects",
    "pred_objects",
    "duplicates",
    "parse_invalid_rate",
)


def render_evaluation(evaluation: Evaluation, title: str) -> RenderableType:
    """Return the numbers of one evaluation with their names, and a table of its classes."""
    gate = f"{evaluation.gate:g} (the gate)"
    table = _table(title, "any class", "right class")
    for words, any_class, right_class in _ROWS:
        cells = (_value(evaluation.metrics, any_class), _value(evaluation.metrics, right_class))
        table.add_row(Text(words.replace(GATE, gate)), *map(Text, cells))
    table.add_section()
    for name in _ALONE:
        table.add_row(Text(NUMBERS[name].words), Text(_value(evaluation.metrics, name)), Text(""))
    return Group(table, _classes(evaluation)) if len(evaluation.classes) > 1 else table


def _classes(evaluation: Evaluation) -> RenderableType:
    shown = list(evaluation.classes.items())[:MOST_CLASSES]
    table = _table("by class", "labelled", "written", "AP50", "AP")
    for name, numbers in shown:
        counted = [f"{numbers[key]:.0f}" for key in ("gt_objects", "pred_objects")]
        measured = [f"{numbers[key]:.3f}" if key in numbers else _NOT_THERE for key in ("map_50", "map")]
        table.add_row(Text(name), *map(Text, (*counted, *measured)))
    left = len(evaluation.classes) - len(shown)
    if left:
        table.add_row(Text(f"and {left} more, in the evaluation's file", style="dim"))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _value(metrics: Mapping[str, float], name: str) -> str:
    value = metrics.get(f"{PREFIX}{name}")
    if value is None:
        return _NOT_THERE
    return f"{value:.3f}" if NUMBERS[name].form == "share" else f"{value:.0f}"
