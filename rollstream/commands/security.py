"""`rollstream acl`: the rights of each role on a shared broker, as a Redis ACL file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

if TYPE_CHECKING:
    from rollstream.acl import Role

PASSWORD_VARIABLE: Final = "ROLLSTREAM_PASSWORD_{}"


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command()(acl)


def acl(
    run: Annotated[str, typer.Argument(help="name of the run, or its folder")],
    redis6: Annotated[
        bool, typer.Option("--redis6", help="coarser rights, for a server before Redis 7")
    ] = False,
) -> None:
    """Print a Redis ACL file with a user for every role; only hashes of passwords stand in it.

    The password of a role is read from ROLLSTREAM_PASSWORD_<ROLE>; without one its user is off.
    """
    import hashlib

    from rollstream.acl import ROLES, acl_file

    passwords = {role: os.environ.get(PASSWORD_VARIABLE.format(role.upper())) for role in ROLES}
    hashes: dict[Role, str] = {
        role: hashlib.sha256(password.encode()).hexdigest()
        for role, password in passwords.items()
        if password
    }
    text = acl_file(Path(run).name, hashes, has_selectors=not redis6)
    for role in ROLES:
        if role not in hashes:
            Console(stderr=True, soft_wrap=True, highlight=False).print(
                f"user of the {role} is off: {PASSWORD_VARIABLE.format(role.upper())} is not set",
                markup=False,
            )
    typer.echo(text, nl=False)
