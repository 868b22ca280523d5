"""The arguments and options that several commands share, in the same words everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(help="the run's YAML file")]
RunPath = Annotated[Path, typer.Argument(help="folder of the run, runs/<name>")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override a key: a.b.c=value; may be given again")
]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable")]
Seed = Annotated[int, typer.Option(help="seed")]
Index = Annotated[int, typer.Option(help="number of this process among those of its role")]
