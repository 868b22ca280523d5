"""Shows one rollout: its text with what is trained on, its objects with reasons and matches, its shapes.

A renderer over values: the command gathers them with the matcher's own code and hands them in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final, Literal

import numpy as np
from PIL import Image
from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from broker_schemas.records.records import GroundTruthObject, MatchedSegment, SegmentRecord
from rollstream.show.drawing import Shape, draw_shapes
from rollstream.show.report.phrases import started
from rollstream.show.visible_text import one_line, visible_text

TokenText = Callable[[int], str]
TokenRole = Literal["prompt", "prefix", "prefix slot", "appended", "appended slot", "appended desc"]
STYLES: Final[Mapping[TokenRole, str]] = {
    "prompt": "dim",
    "prefix": "",
    "prefix slot": "bold #00303a on #8fe0f0",
    "appended": "#10310f on #b6e8a4",
    "appended slot": "bold #3a2b00 on #ffd977",
    "appended desc": "italic #333333 on #d4d4d4",
}
MEANINGS: Final[Mapping[TokenRole, str]] = {
    "prompt": "prompt, not trained",
    "prefix": "written by the model, not trained",
    "prefix slot": "coordinate of a matched object → its target",
    "appended": "appended, cross-entropy",
    "appended slot": "appended coordinate → its bin",
    "appended desc": "appended desc, not trained",
}
# before the first token of each stretch, so that a page without colours tells the roles too
MARKS: Final[Mapping[TokenRole, str]] = {
    "prompt": "",
    "prefix": "▷",
    "prefix slot": "◇",
    "appended": "▶",
    "appended slot": "◆",
    "appended desc": "▪",
}
_SHOWN_REPEATS: Final = 4


@dataclass(frozen=True, kw_only=True)
class InspectedObject:
    """One object the parser found.

    ``reason`` says why it was dropped, empty for a valid one. ``ground_truth_index`` is its match in the
    record's assistant payload, None without one; ``targets`` are the bins its slots are pulled to.
    """

    number: int
    desc: str = ""
    geometry: Literal["bbox_2d", "poly", ""] = ""
    bins: tuple[int, ...] = ()
    reason: str = ""
    ground_truth_index: int | None = None
    targets: tuple[int, ...] = ()

    def shape(self) -> Shape | None:
        """Return what can be drawn of it, None where its geometry is incomplete."""
        key = self.geometry or "bbox_2d"
        return Shape.from_map({"desc": f"{self.number} {self.desc}".strip(), key: list(self.bins)})


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """One rollout and what became of it; ``matched`` is None when no segment was built (``verdict``).

    ``base``: the model that its policy was an adapter of, empty for a whole one.
    """

    segment: SegmentRecord
    objects: tuple[InspectedObject, ...]
    matched: MatchedSegment | None = None
    is_invalid: bool = False
    truncated: bool = False
    verdict: str = ""
    dropped: Mapping[str, int] = field(default_factory=dict)
    base: str = ""


def token_roles(matched: MatchedSegment) -> list[TokenRole]:
    """Return the role of each token of a training sequence, in order.

    The appended part begins at the first token in the cross-entropy: a fragment always starts with structure.
    """
    num_tokens = len(matched.token_ids)
    supervised = np.flatnonzero(matched.ce_mask)
    appended_from = int(supervised[0]) if len(supervised) else num_tokens
    slots = {
        int(at): bool(inside)
        for at, inside in zip(matched.slot_positions, matched.slot_in_prefix, strict=True)
    }
    found: list[TokenRole] = []
    for at in range(num_tokens):
        if at < matched.prompt_length:
            found.append("prompt")
        elif at in slots:
            found.append("prefix slot" if slots[at] else "appended slot")
        elif matched.ce_mask[at]:
            found.append("appended")
        else:
            found.append("appended desc" if at >= appended_from else "prefix")
    return found


def render_inspection(inspection: Inspection, token_text: TokenText) -> RenderableType:
    """Return head, coloured text with its legend, and tables; ``token_text`` gives the text of a token id."""
    parts: list[RenderableType] = [_head(inspection)]
    if inspection.matched is None:
        verdict = one_line(inspection.verdict, 200) or "no training segment is kept for this rollout"
        parts.append(Text(verdict, style="bold yellow"))
        ids = inspection.segment.response_token_ids
        body = Text(visible_text("".join(token_text(int(token_id)) for token_id in ids)))
        parts.append(Panel(body, title="rollout as written", title_align="left", box=box.ROUNDED))
    else:
        text = sequence_text(inspection.matched, token_text, is_marked=True)
        parts.append(Panel(text, title="training sequence", title_align="left", box=box.ROUNDED))
        parts.append(_legend())
    parts += [_objects(inspection), _ground_truth(inspection)]
    return Group(*parts)


def sequence_text(matched: MatchedSegment, token_text: TokenText, *, is_marked: bool = False) -> Text:
    """Return the training sequence coloured by role; a run of one prompt token is shown once, counted.

    ``is_marked``: the mark of a role stands before each stretch of it.
    """
    targets = {
        int(at): int(bin_index)
        for at, bin_index in zip(matched.slot_positions, matched.slot_targets, strict=True)
    }
    roles = token_roles(matched)
    text = Text()
    last_role: TokenRole | None = None
    for (token_id, role), run in groupby(
        range(len(roles)), key=lambda at: (int(matched.token_ids[at]), roles[at])
    ):
        places = list(run)
        if is_marked and role != last_role:
            text.append(MARKS[role], style=STYLES[role])
        last_role = role
        piece = visible_text(token_text(token_id))
        if role == "prompt" and len(places) > _SHOWN_REPEATS:
            text.append(f"{piece}×{len(places)}", style=STYLES[role])
            continue
        for at in places:
            text.append(piece, style=STYLES[role])
            if at in targets:
                text.append(f"→{targets[at]}", style=f"{STYLES[role]} underline")
    return text


def draw_inspection(inspection: Inspection, image: Image.Image) -> Image.Image:
    """Return the image with ground truth and all objects that can be drawn; labels begin with the number."""
    truth = (
        Shape.from_map({"desc": item.desc, item.geometry: list(item.bins)})
        for item in inspection.segment.assistant_payload
    )
    wrote = (item.shape() for item in inspection.objects)
    return draw_shapes(
        image,
        ground_truth=[shape for shape in truth if shape is not None],
        predictions=[shape for shape in wrote if shape is not None],
    )


def _head(inspection: Inspection) -> RenderableType:
    segment = inspection.segment
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    flags = [
        segment.finish_reason,
        "cut off" if inspection.truncated else "",
        "not a valid rollout" if inspection.is_invalid else "",
    ]
    tokens = f"{len(segment.prompt_token_ids)} prompt, {len(segment.response_token_ids)} written"
    if inspection.matched is not None:
        tokens += f", {inspection.matched.encoded_length} in the training sequence"
    lines = (
        ("record", segment.record_id),
        ("sample", f"{segment.sample_id}  {' '.join(image.path for image in segment.images)}"),
        ("policy", _policy(inspection)),
        ("producer", _origin(segment)),
        ("tokens", tokens),
        ("ended", ", ".join(flag for flag in flags if flag)),
        ("dropped", ", ".join(f"{reason} {count}" for reason, count in inspection.dropped.items()) or "–"),
    )
    for name, value in lines:
        table.add_row(name, Text(one_line(value, 300)))
    return table


def _policy(inspection: Inspection) -> str:
    segment = inspection.segment
    spans = ", ".join(f"v{policy_version} × {count}" for policy_version, count in segment.version_spans)
    kind = f", an adapter on {inspection.base}" if inspection.base else ""
    return f"v{segment.policy_version}" + (f" ({spans})" if spans else "") + kind


def _origin(segment: SegmentRecord) -> str:
    """Say who wrote a rollout and when, as far as it is known: a training segment keeps name and time."""
    known = [segment.producer] if segment.producer else []
    known += [f"{segment.generation_ms} ms, seed {segment.seed}"] if segment.generation_ms else []
    known += [f"written {started(segment.generated_at_ms)}"] if segment.generated_at_ms else []
    return ", ".join(known) or "–"


def _legend() -> RenderableType:
    table = Table.grid(padding=(0, 3))
    cells = [Text(f" {MARKS[role]} {meaning} ", style=STYLES[role]) for role, meaning in MEANINGS.items()]
    for left, right in zip(cells[0::2], cells[1::2], strict=True):
        table.add_row(left, right)
    return table


def _objects(inspection: Inspection) -> RenderableType:
    table = Table(title="objects in the rollout", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("n", justify="right")
    table.add_column("desc", overflow="fold", ratio=2)
    table.add_column("geometry", overflow="fold", ratio=3)
    table.add_column("verdict", overflow="fold", ratio=2)
    table.add_column("targets", overflow="fold", ratio=3)
    for item in inspection.objects:
        table.add_row(
            str(item.number),
            Text(one_line(item.desc, 60)),
            f"{item.geometry} {_bins(item.bins)}".strip(),
            _verdict(item, inspection.segment.assistant_payload),
            _bins(item.targets),
        )
    if not inspection.objects:
        table.add_row("", Text("none", style="dim"), "", "", "")
    return table


def _verdict(item: InspectedObject, truth: Sequence[GroundTruthObject]) -> Text:
    if item.reason:
        return Text(one_line(item.reason, 40), style="red")
    if item.ground_truth_index is None:
        return Text("valid, not matched", style="yellow")
    known = item.ground_truth_index < len(truth)
    name = one_line(truth[item.ground_truth_index].desc, 24) if known else "?"
    return Text(f"matched: {item.ground_truth_index} {name}", style="green")


def _ground_truth(inspection: Inspection) -> RenderableType:
    table = Table(title="ground truth", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("index", justify="right")
    table.add_column("desc", overflow="fold", ratio=2)
    table.add_column("geometry", overflow="fold", ratio=3)
    table.add_column("found by", overflow="fold", ratio=2)
    finder = {item.ground_truth_index: item.number for item in inspection.objects}
    for index, truth in enumerate(inspection.segment.assistant_payload):
        found = Text("appended" if inspection.matched is not None else "nothing", style="yellow")
        if index in finder:
            found = Text(f"object {finder[index]}", style="green")
        table.add_row(
            str(index), Text(one_line(truth.desc, 60)), f"{truth.geometry} {_bins(truth.bins)}", found
        )
    if not inspection.segment.assistant_payload:
        table.add_row("", Text("none", style="dim"), "", "")
    return table


def _bins(bins: Sequence[int]) -> str:
    return " ".join(str(value) for value in bins)
