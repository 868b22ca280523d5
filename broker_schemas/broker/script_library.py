"""Loads the Lua transitions and calls them by name; knows their files, not their meaning."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, Final

import redis

from broker_schemas.broker.connection import broker_errors

Argument = bytes | str | int | float
BODY_EXPIRY_S: Final = 120
"""How long a body that no transition took may stay: longer than any pipeline takes to arrive."""


@cache
def script_source(name: str) -> str:
    """Return the text of a transition: the prelude, then its own file."""
    folder = resources.files("broker_schemas.broker") / "scripts"
    return (folder / "prelude.lua").read_text("utf-8") + (folder / f"{name}.lua").read_text("utf-8")


@cache
def script_sha(name: str) -> str:
    """Return the SHA-1 by which the server knows the transition."""
    return hashlib.sha1(script_source(name).encode(), usedforsecurity=False).hexdigest()


def run_script(
    client: redis.Redis,
    name: str,
    keys: Sequence[str],
    arguments: Sequence[Argument],
    bodies: Sequence[tuple[str, bytes]] = (),
) -> Any:
    """Call a transition; a server that has forgotten it (restart) is told it again. Raises BrokerError.

    ``bodies`` are put at their keys in the same pipeline, with an expiry, for the transition to take.
    """
    with broker_errors(f"script {name}"):
        try:
            return _call(client, bodies, "EVALSHA", script_sha(name), len(keys), *keys, *arguments)
        except redis.exceptions.NoScriptError:
            return _call(client, bodies, "EVAL", script_source(name), len(keys), *keys, *arguments)


def _call(client: redis.Redis, bodies: Sequence[tuple[str, bytes]], *command: Argument) -> Any:
    pipe: Any = client.pipeline(transaction=False)
    for key, body in bodies:
        pipe.execute_command("SET", key, body, "EX", BODY_EXPIRY_S)
    pipe.execute_command(*command)
    replies = pipe.execute(raise_on_error=False)
    for reply in replies:  # a body that found no room first: that is why the transition missed it
        if isinstance(reply, Exception):
            raise reply
    return replies[-1]
