"""The live view of a run, for ``rollstream up`` and ``rollstream top``: what happens, and who waits for whom.

Reads only what was appended to the run folder since the last call; the time is passed in.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from broker_schemas.errors import DataError
from rollstream.run_folder import (
    JsonLinesReader,
    Row,
    RunFolder,
    config_value,
    latest_steps,
    read_resolved_config,
)
from rollstream.show.report.counting import count, counts, number, rate_per_s, total
from rollstream.show.report.phrases import NOT_WRITTEN, decimal, duration, percent, rate, reasons, whole
from rollstream.show.visible_text import one_line
from rollstream.watch.bottleneck import (
    HEALTHY_STATES,
    NUM_RECENT_STEPS,
    bottleneck,
    broken_roles,
    depths,
    roles,
    wait_share,
)

NUM_SHOWN_STEPS: Final = 6
SILENT_AFTER_MS: Final = 6_000
_NUM_KEPT: Final = 60

__all__ = ["LiveView", "ViewSettings", "bottleneck", "render_live"]


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """What a view shows of the configuration; None where it is not known."""

    run_name: str
    variant: str = ""
    max_steps: int | None = None
    queue_limit: int | None = None


class LiveView:
    """Follows one run folder; ``render`` may be called as often as one likes."""

    def __init__(self, run_folder: RunFolder) -> None:
        self._folder = run_folder
        self._settings: ViewSettings | None = None
        self._sample_lines = JsonLinesReader(run_folder.stack_samples)
        self._step_lines = JsonLinesReader(run_folder.train_log)
        self._samples: deque[Row] = deque(maxlen=_NUM_KEPT)
        self._steps: list[Row] = []
        self._first_ms: float | None = None

    def render(self, now_ms: int) -> RenderableType:
        """Return the view at ``now_ms`` (the clock of the samples), readable at 80 columns."""
        new_samples, new_steps = self._sample_lines.read_new(), self._step_lines.read_new()
        self._samples.extend(new_samples)
        self._steps = latest_steps([*self._steps, *new_steps])[-_NUM_KEPT:]
        if self._first_ms is None:
            times = [number(row, "time_ms") for row in (*new_samples, *new_steps)]
            self._first_ms = min((time_ms for time_ms in times if time_ms is not None), default=None)
        return render_live(
            list(self._samples), self._steps, self._known_settings(), now_ms=now_ms, first_ms=self._first_ms
        )

    def _known_settings(self) -> ViewSettings:
        """Read the resolved configuration once it is there; a torn one is tried again at the next call."""
        if self._settings is not None:
            return self._settings
        try:
            config = read_resolved_config(self._folder.resolved_config)
        except DataError:
            config = {}
        if not config:
            return ViewSettings(run_name=self._folder.name)
        self._settings = ViewSettings(
            run_name=str(config_value(config, "run", "name", default=self._folder.name)),
            variant=str(config_value(config, "custom", "trainer_variant", default="")),
            max_steps=count(config_value(config, "training", default={}), "max_steps"),
            queue_limit=count(config_value(config, "stage2_async", default={}), "queue_limit"),
        )
        return self._settings


def render_live(
    samples: Sequence[Row],
    steps: Sequence[Row],
    settings: ViewSettings,
    *,
    now_ms: int,
    first_ms: float | None = None,
) -> RenderableType:
    """Return the view of the last samples and steps (both in order, both may be empty)."""
    sample = samples[-1] if samples else {}
    parts: list[RenderableType] = [
        _progress(sample, steps, settings),
        _who_waits(sample, steps, settings, now_ms),
        *_advice(sample),
        _flow(sample, settings),
        _numbers(samples, steps),
        _losses(sample),
        _role_line(sample),
        _decisions(steps),
    ]
    title = " · ".join(
        part for part in (one_line(settings.run_name, 30), one_line(settings.variant, 24)) if part
    )
    elapsed = "" if first_ms is None else duration(max(_seen_until(sample, now_ms) - first_ms, 0) / 1000)
    return Panel(
        Group(*parts),
        title=Text(f"rollstream · {title}", style="bold"),
        title_align="left",
        subtitle=Text(elapsed, style="dim"),
        subtitle_align="right",
        box=box.ROUNDED,
        padding=(0, 1),
    )


def _seen_until(sample: Row, now_ms: int) -> float:
    """Return now, or the last sign of life where the stack is silent: a stopped run does not grow older."""
    time_ms = number(sample, "time_ms")
    return now_ms if time_ms is None or now_ms - time_ms <= SILENT_AFTER_MS else time_ms


def _progress(sample: Row, steps: Sequence[Row], settings: ViewSettings) -> RenderableType:
    last = steps[-1] if steps else {}
    done = _steps_done(sample, last)
    of = f" of {settings.max_steps}" if settings.max_steps is not None else ""
    line = Table.grid(padding=(0, 2), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    version = count(sample, "policy_version")
    line.add_row(
        Text.assemble(("step ", "dim"), (f"{done}{of}", "bold")),
        ProgressBar(total=settings.max_steps or 1, completed=done if settings.max_steps else 0),
        Text.assemble(("policy ", "dim"), "–" if version is None else f"v{version}"),
    )
    return line


def _steps_done(sample: Row, last: Row) -> int:
    """Return how many optimizer steps are done: the last logged one counts from 0."""
    logged = count(last, "optimizer_step")
    return max((logged + 1) if logged is not None else 0, count(sample, "optimizer_step") or 0)


def _who_waits(sample: Row, steps: Sequence[Row], settings: ViewSettings, now_ms: int) -> RenderableType:
    time_ms = number(sample, "time_ms")
    if time_ms is not None and now_ms - time_ms > SILENT_AFTER_MS:
        silent = duration((now_ms - time_ms) / 1000)
        return Text(
            f"▲ no sample for {silent}: the stack is stopped or its monitor hangs", style="bold yellow"
        )
    said = bottleneck(sample, steps, queue_limit=settings.queue_limit)
    calm = said.startswith(("nobody", "nothing", "producers wait"))
    style = "bold red" if broken_roles(sample) else "green" if calm else "yellow"
    return Text(f"▶ {said}", style=style)


def _advice(sample: Row) -> list[RenderableType]:
    """Show what the dispatcher says where no demand could serve the B steps fresh."""
    said = sample.get("demand_advice")
    return [Text(f"▲ {one_line(said, 400)}", style="yellow")] if isinstance(said, str) and said else []


def _flow(sample: Row, settings: ViewSettings) -> RenderableType:
    """Show the way of the rollouts: where how many of them are."""
    per_rank = depths(sample)
    limit = f" (limit {settings.queue_limit})" if settings.queue_limit is not None and per_rank else ""
    ready = " ".join(str(depth) for depth in per_rank) or NOT_WRITTEN
    table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1), show_edge=False)
    columns = (
        ("asked for", _shown(sample, "requested")),
        ("in flight", _shown(sample, "in_flight")),
        ("to match", _shown(sample, "segments_waiting")),
        ("to pack", _shown(sample, "matched_waiting")),
        ("ready per rank", f"{ready}{limit}"),
        ("trained", _shown(sample, "trained_segments")),
    )
    for title, _ in columns:
        table.add_column(Text(title), justify="center", header_style="dim", no_wrap=True)
    table.add_row(*(Text(value, style="bold") for _, value in columns))
    return table


def _numbers(samples: Sequence[Row], steps: Sequence[Row]) -> RenderableType:
    recent = steps[-NUM_RECENT_STEPS:]
    b_steps = [row for row in steps if row.get("kind") == "B"]
    last_b = b_steps[-1] if b_steps else {}
    timed = total(recent, "step_s")
    cells = (
        ("loss A", decimal(_last(steps, "A")), "loss B", decimal(_last(steps, "B"))),
        (
            "lag generated",
            decimal(number(samples[-1], "lag_generated_mean") if samples else None),
            "lag claimed",
            _claimed_lag(last_b),
        ),
        (
            "fill",
            percent(number(last_b, "fill")),
            "learner idle",
            percent(wait_share(recent)) if recent else "–",
        ),
        (
            "rollouts",
            rate(rate_per_s(samples, "pushed")),
            "tokens",
            rate(total(recent, "num_tokens") / timed if timed > 0 else None),
        ),
    )
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in range(2):
        table.add_column(style="dim", no_wrap=True)
        table.add_column(no_wrap=True, ratio=1)
    for row in cells:
        table.add_row(*row)
    return table


def _losses(sample: Row) -> RenderableType:
    """Show what was lost on the way, by reason."""
    text = Text()
    for name, style in (("dropped", "yellow"), ("rejected", "red")):
        found = counts(sample, name)
        text.append(f"{name} ", style="dim")
        text.append(whole(sum(found.values())) if sample else NOT_WRITTEN, style=style if found else "")
        text.append(f" ({reasons(found)})" if found else "", style="dim")
        text.append("  ")
    text.append("duplicates ", style="dim")
    text.append(_shown(sample, "duplicates"))
    return text


def _role_line(sample: Row) -> RenderableType:
    """Show one sign for each process, and how often a role was started again."""
    names = list(dict.fromkeys(str(role.get("role", "?")) for role in roles(sample)))
    text = Text()
    restarts: Counter[str] = Counter()
    for name in names:
        text.append(f"{one_line(name, 16)} ", style="dim")
        for role in roles(sample):
            if str(role.get("role", "?")) == name:
                healthy = str(role.get("state", "")) in HEALTHY_STATES
                text.append("●" if healthy else "○", style="green" if healthy else "bold red")
                restarts[name] += count(role, "restarts") or 0
        again = f" ({restarts[name]} restart{'s' if restarts[name] > 1 else ''})"
        text.append(again if restarts[name] else "", style="yellow")
        text.append("  ")
    return text if names else Text("no role is reported yet", style="dim")


def _decisions(steps: Sequence[Row]) -> RenderableType:
    """Show the last decisions with their reasons, newest first."""
    table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1), show_edge=False)
    for title, justify in (
        ("step", "right"),
        ("kind", "center"),
        ("because", "left"),
        ("loss", "right"),
        ("segments", "right"),
        ("lag", "right"),
        ("fill", "right"),
        ("wait s", "right"),
        ("busy s", "right"),
    ):
        table.add_column(title, justify=justify, header_style="dim", no_wrap=True)  # type: ignore[arg-type]
    for row in list(steps)[: -NUM_SHOWN_STEPS - 1 : -1]:
        kind = one_line(str(row.get("kind", "?")), 4)
        reason = one_line(str(row.get("reason", "")), 14)
        table.add_row(
            _shown(row, "optimizer_step"),
            Text(kind, style="bold cyan" if kind == "B" else ""),
            Text(reason, style="yellow" if kind == "A" and reason != "schedule" else ""),
            decimal(number(row, "loss")),
            _shown(row, "num_segments"),
            decimal(number(row, "lag_claimed_mean")) if kind == "B" else NOT_WRITTEN,
            f"{number(row, 'fill') or 0:.0%}" if kind == "B" else NOT_WRITTEN,
            _seconds(row, "wait_s"),
            _seconds(row, "busy_s"),
        )
    return table if steps else Text("no step yet", style="dim")


def _claimed_lag(row: Mapping[str, Any]) -> str:
    mean, highest = number(row, "lag_claimed_mean"), number(row, "lag_claimed_max")
    return (
        NOT_WRITTEN
        if mean is None
        else decimal(mean) + (f" (max {highest:.0f})" if highest is not None else "")
    )


def _last(steps: Sequence[Row], kind: str) -> float | None:
    losses = [loss for row in steps if row.get("kind") == kind and (loss := number(row, "loss")) is not None]
    return losses[-1] if losses else None


def _seconds(row: Mapping[str, Any], name: str) -> str:
    value = number(row, name)
    return NOT_WRITTEN if value is None else f"{value:.2f}"


def _shown(row: Mapping[str, Any], name: str) -> str:
    return whole(count(row, name))
