"""The help of a group of commands, in plain text: frames around it would take a third of its time."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup


class PlainGroup(TyperGroup):
    """A group whose help lists each command with the whole sentence that it says of itself."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands in their order."""
        known = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, command.get_short_help_str(limit=400)) for name, command in known if command]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def command_group() -> typer.Typer:
    """Return a group of commands whose help, and theirs, is plain."""
    return typer.Typer(cls=PlainGroup, rich_markup_mode=None, no_args_is_help=True)
