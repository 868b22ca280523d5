"""What a check found: a verdict, what is so, and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from rich.table import Table
from rich.text import Text

Verdict = Literal["ok", "warn", "fail"]
_STYLE: Final[dict[Verdict, str]] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor. ``remedy`` says what to change; empty only for ok."""

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ok(check: str, found: str) -> Finding:
    return Finding(check=check, verdict="ok", found=found)


def warn(check: str, found: str, remedy: str) -> Finding:
    return Finding(check=check, verdict="warn", found=found, remedy=remedy)


def fail(check: str, found: str, remedy: str) -> Finding:
    return Finding(check=check, verdict="fail", found=found, remedy=remedy)


def render_findings(findings: Sequence[Finding]) -> Table:
    """Return the findings as a table without frames, in the order given."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column("verdict", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in findings:
        text = Text(finding.found)
        if finding.remedy:
            text.append(f"\n-> {finding.remedy}", style="bold")
        table.add_row(Text(finding.verdict, style=_STYLE[finding.verdict]), Text(finding.check), text)
    return table
