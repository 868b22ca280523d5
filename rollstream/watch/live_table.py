"""The live view of a run, for ``rollstream up`` and ``rollstream top``: what happens, and who waits for whom.

Reads only what is new since the last call, from the run folder or its broker; the time is passed in.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from rich import box
from rich.console import RenderableType
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
    is_silent,
    roles,
    wait_share,
)
from rollstream.watch.fitted import FittedSteps, PairsTable, flow_table

SILENT_AFTER_MS: Final = 6_000
_NUM_KEPT_SAMPLES: Final = 60
_NUM_KEPT_STEPS: Final = 200

__all__ = ["LiveView", "ViewSettings", "bottleneck", "render_live"]


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """What a view shows of the configuration; None where it is not known."""

    run_name: str
    variant: str = ""
    max_steps: int | None = None
    queue_limit: int | None = None


class RowSource(Protocol):
    """Where new rows come from: a file that grows, a broker, a log that is read once."""

    def read_new(self) -> list[Row]:
        """Return the rows since the last call, oldest first."""


class StepSource:
    """The steps: from the training log where the run folder is at hand, else from the broker's log."""

    def __init__(self, train_log: Path, otherwise: RowSource) -> None:
        self._train_log = train_log
        self._file = JsonLinesReader(train_log)
        self._otherwise = otherwise

    def read_new(self) -> list[Row]:
        found = self._otherwise.read_new()
        return self._file.read_new() if self._train_log.exists() else found


class LiveView:
    """Follows one run; ``render`` may be called as often as one likes.

    ``samples`` and ``steps`` come from the run folder where nothing else is given; ``is_over``: no stack
    runs, and what is shown is what it left behind.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        *,
        samples: RowSource | None = None,
        steps: RowSource | None = None,
        settings: ViewSettings | None = None,
        is_over: bool = False,
    ) -> None:
        self._folder = run_folder
        self._settings = settings
        self._is_over = is_over
        self._sample_lines = samples or JsonLinesReader(run_folder.stack_samples)
        self._step_lines = steps or JsonLinesReader(run_folder.train_log)
        self._samples: deque[Row] = deque(maxlen=_NUM_KEPT_SAMPLES)
        self._steps: list[Row] = []
        self._first_ms: float | None = None

    def render(self, now_ms: int) -> RenderableType:
        """Return the view at ``now_ms`` (the clock of the samples), readable at 40 columns and more."""
        new_samples, new_steps = self._sample_lines.read_new(), self._step_lines.read_new()
        self._samples.extend(new_samples)
        self._steps = latest_steps([*self._steps, *new_steps])[-_NUM_KEPT_STEPS:]
        if self._first_ms is None:
            times = [number(row, "time_ms") for row in (*new_samples, *new_steps)]
            self._first_ms = min((time_ms for time_ms in times if time_ms is not None), default=None)
        return render_live(
            list(self._samples),
            self._steps,
            self._known_settings(),
            now_ms=now_ms,
            first_ms=self._first_ms,
            is_over=self._is_over,
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
    is_over: bool = False,
) -> RenderableType:
    """Return the view of the last samples and steps (both in order, both may be empty)."""
    sample = samples[-1] if samples else {}
    parts: list[RenderableType] = [
        _progress(sample, steps, settings),
        _over(sample, now_ms) if is_over else _who_waits(samples, steps, settings, now_ms),
        *_advice(sample),
        flow_table(sample, settings.queue_limit),
        _numbers(samples, steps),
        _losses(sample),
        *_evaluation(sample),
        _role_line(sample),
    ]
    title = " · ".join(
        part for part in (one_line(settings.run_name, 30), one_line(settings.variant, 24)) if part
    )
    elapsed = "" if first_ms is None else duration(max(_seen_until(sample, now_ms) - first_ms, 0) / 1000)
    return Panel(
        FittedSteps(parts, steps),
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


def _over(sample: Row, now_ms: int) -> RenderableType:
    time_ms = number(sample, "time_ms")
    if time_ms is None:
        return Text("■ no stack runs, and it left no log that could be read", style="bold yellow")
    return Text(
        f"■ no stack runs; so it stood {duration((now_ms - time_ms) / 1000)} ago", style="bold yellow"
    )


def _who_waits(
    samples: Sequence[Row], steps: Sequence[Row], settings: ViewSettings, now_ms: int
) -> RenderableType:
    sample = samples[-1] if samples else {}
    time_ms = number(sample, "time_ms")
    if time_ms is not None and now_ms - time_ms > SILENT_AFTER_MS:
        silent = duration((now_ms - time_ms) / 1000)
        return Text(
            f"▲ no sample for {silent}: the stack is stopped or its monitor hangs", style="bold yellow"
        )
    if is_silent(sample):
        return Text(_silence(samples, now_ms), style="bold red")
    said = bottleneck(sample, steps, queue_limit=settings.queue_limit)
    calm = said.startswith(("nobody", "nothing", "producers wait"))
    style = "bold red" if broken_roles(sample) else "green" if calm else "yellow"
    return Text(f"▶ {said}", style=style)


def _silence(samples: Sequence[Row], now_ms: int) -> str:
    """Say that the broker does not answer, for how long, and what is wrong where the sample tells it."""
    heard = [time_ms for row in samples if not is_silent(row) if (time_ms := number(row, "time_ms"))]
    since = f" for {duration((now_ms - heard[-1]) / 1000)}" if heard else ""
    trouble = one_line(str(samples[-1].get("broker_trouble", "")), 120)
    return f"▲ the broker does not answer{since}" + (f": {trouble}" if trouble else "")


def _advice(sample: Row) -> list[RenderableType]:
    """Show what the dispatcher says where no demand could serve the B steps fresh."""
    said = sample.get("demand_advice")
    return [Text(f"▲ {one_line(said, 400)}", style="yellow")] if isinstance(said, str) and said else []


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
    return PairsTable(cells)


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
    text.append(whole(count(sample, "duplicates")))
    return text


def _evaluation(sample: Row) -> list[RenderableType]:
    """Show the round of evaluation that is under way, and what the last one gave, if any."""
    told = sample.get("evaluation")
    if not isinstance(told, Mapping):
        return []
    text = Text.assemble(("evaluation ", "dim"))
    if not told.get("is_settled"):
        asked, outstanding = count(told, "asked") or 0, count(told, "outstanding") or 0
        text.append(f"of v{whole(count(told, 'policy_version'))}: ")
        text.append(f"{max(asked - outstanding, 0)} of {asked} asked are answered  ")
    evaluated = count(told, "evaluated_version")
    if evaluated is not None:
        text.append(f"v{evaluated} ", style="dim")
        text.append(f"F1 {percent(number(told, 'f1'))}", style="bold")
    return [text]


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
