"""The arguments and options that several commands share, in the same words everywhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def _ask_for_json_lines(is_asked: bool) -> bool:
    """Note it for this process and for those that it starts."""
    if is_asked:
        os.environ["ROLLSTREAM_LOG_JSON"] = "1"
    return is_asked


ConfigPath = Annotated[Path, typer.Argument(help="the run's YAML file")]
RunPath = Annotated[Path, typer.Argument(help="folder of the run, runs/<name>")]
WatchedPath = Annotated[Path, typer.Argument(help="folder of the run, runs/<name>, or its YAML file")]
BrokerUrl = Annotated[
    str | None,
    typer.Option("--broker", help="the run's broker, redis://host:port/0, where the file says another"),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override a key: a.b.c=value; may be given again")
]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable")]
Seed = Annotated[int, typer.Option(help="seed")]
LogJson = Annotated[
    bool,
    typer.Option("--log-json", callback=_ask_for_json_lines, help="log lines as JSON, one object a line"),
]
Index = Annotated[int, typer.Option(help="number of this process among those of its role")]
