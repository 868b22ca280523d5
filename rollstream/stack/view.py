"""Shows a running stack: the live table on a terminal, else a plain line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console
from rich.live import Live

from rollstream.run_folder import JsonLinesReader, Row, RunFolder
from rollstream.watch.live_table import LiveView

REFRESH_EVERY_S: Final = 0.5
LINE_EVERY_S: Final = 5.0


def plain_line(sample: Mapping[str, Any], last_step: Mapping[str, Any], max_steps: int) -> str:
    """Return one line: steps done, the last one, where the rollouts are. Both maps may be empty."""
    done = max(int(last_step.get("optimizer_step", -1)) + 1, int(sample.get("optimizer_step") or 0))
    parts = [f"step {done}/{max_steps}"]
    if last_step:
        loss = last_step.get("loss")
        shown = f"{loss:.4f}" if isinstance(loss, int | float) else "?"
        parts.append(f"{last_step.get('kind', '?')} ({last_step.get('reason', '')}) loss {shown}")
    if "ready_depth" in sample:
        parts.append("ready " + " ".join(str(depth) for depth in sample["ready_depth"]))
        parts.append(f"in flight {sample['in_flight']}")
        parts.append(f"to match {sample['segments_waiting']}, to pack {sample['matched_waiting']}")
        parts.append(f"trained {sample['trained_segments']}, dropped {sum(sample['dropped'].values())}")
    elif sample:
        parts.append("the broker does not answer")
    broken = [f"{role['role']} {role['index']} is {role['state']}" for role in _troubled(sample)]
    return " | ".join([*parts, *broken])


def _troubled(sample: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [role for role in sample.get("roles", []) if role["state"] not in ("running", "done")]


class StackView:
    """Follows the run folder; ``say`` writes a line above the table."""

    def __init__(
        self,
        folder: RunFolder,
        console: Console,
        *,
        max_steps: int,
        is_live: bool,
        last_sample: Callable[[], Row],
    ) -> None:
        self._console = console
        self._max_steps = max_steps
        self._last_sample = last_sample
        self._table = LiveView(folder)
        self._steps = JsonLinesReader(folder.train_log)
        self._last_step: Row = {}
        self._last_line = ""
        self._due_s = 0.0
        self._live = Live(console=console, auto_refresh=False) if is_live else None
        if self._live is None:
            self._steps.read_new()  # an earlier run's steps are not this one's news

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refresh()
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Write a line that stays."""
        self._console.print(text, markup=False, highlight=False)

    def tick(self, now_s: float) -> None:
        """Show the state where it is time to; ``now_s`` is monotonic."""
        if now_s >= self._due_s:
            self._due_s = now_s + (REFRESH_EVERY_S if self._live is not None else LINE_EVERY_S)
            self.refresh()

    def refresh(self) -> None:
        """Show the state now; an unchanged plain line is not repeated."""
        if self._live is not None:
            self._live.update(self._table.render(int(time.time() * 1000)), refresh=True)
            return
        rows = self._steps.read_new()
        self._last_step = rows[-1] if rows else self._last_step
        sample = self._last_sample()
        if not sample and not self._last_step:
            return
        line = plain_line(sample, self._last_step, self._max_steps)
        if line != self._last_line:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._last_line = line
