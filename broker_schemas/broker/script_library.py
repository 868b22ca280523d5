"""Loads the Lua transitions and calls them by name; knows their files, not their meaning."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from itertools import chain
from typing import Any

import redis

from broker_schemas.broker.connection import broker_errors

Argument = bytes | str | int | float


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

    ``bodies`` are put at their keys for the transition to take, in one transaction with it; what it does not
    take is gone afterwards.
    """
    called = (len(keys), *keys, *arguments)
    by_sha, by_text = ("EVALSHA", script_sha(name), *called), ("EVAL", script_source(name), *called)
    with broker_errors(f"script {name}"):
        try:
            return _call(client, by_sha, bodies)
        except redis.exceptions.NoScriptError:
            return _call(client, by_text, bodies)
        except redis.exceptions.OutOfMemoryError:
            if bodies:  # what needs none may free the memory that is missing
                _call(client, by_text, ())
            raise


def _call(client: Any, command: Sequence[Argument], bodies: Sequence[tuple[str, bytes]]) -> Any:
    if not bodies:
        return client.execute_command(*command)
    pipe = client.pipeline(transaction=True)
    # one command for all of them: the server wakes up and answers once, instead of for each
    pipe.execute_command("MSET", *chain.from_iterable(bodies))
    pipe.execute_command(*command)
    pipe.execute_command("UNLINK", *(key for key, _ in bodies))
    try:
        reply = pipe.execute(raise_on_error=False)[1]
    except redis.exceptions.OutOfMemoryError as exc:  # its text would begin with the bodies
        raise redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'") from exc
    if isinstance(reply, Exception):
        raise reply
    return reply
