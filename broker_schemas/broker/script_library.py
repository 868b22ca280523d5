"""Loads the Lua transitions and calls them by name; knows their files, not their meaning."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
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


def run_script(client: redis.Redis, name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
    """Call a transition; a server that has forgotten it (restart) is told it again. Raises BrokerError."""
    with broker_errors(f"script {name}"):
        try:
            return client.evalsha(script_sha(name), len(keys), *keys, *arguments)
        except redis.exceptions.NoScriptError:
            return client.eval(script_source(name), len(keys), *keys, *arguments)
