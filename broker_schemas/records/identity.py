"""What a run is: an id, the values that decide its past, and those that may change while it runs [Q-18].

Pure; the values are JSON texts under dotted keys. Who keeps them, and where, is known elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from broker_schemas.errors import ConfigError

MAX_STEPS = "training.max_steps"


@dataclass(frozen=True, kw_only=True)
class SettingsChange:
    """Settings that hold from ``optimizer_step`` on: key -> (value before, value since), as JSON texts."""

    optimizer_step: int
    changes: Mapping[str, tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """A run. ``settings`` are those it began with; ``changed`` what became of them, oldest first."""

    run_id: str
    deciding: Mapping[str, str]
    settings: Mapping[str, str]
    changed: tuple[SettingsChange, ...] = field(default=())

    @property
    def current_settings(self) -> dict[str, str]:
        """Return the settings in force now."""
        current = dict(self.settings)
        for change in self.changed:
            current |= {key: since for key, (_, since) in change.changes.items()}
        return current

    def to_json(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "deciding": dict(self.deciding),
            "settings": dict(self.settings),
            "changed": [
                {"optimizer_step": change.optimizer_step, "changes": dict(change.changes)}
                for change in self.changed
            ],
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> RunIdentity:
        """Read what ``to_json`` gave; raises KeyError, TypeError, ValueError for anything else."""
        return cls(
            run_id=str(body["run_id"]),
            deciding=_texts(body["deciding"]),
            settings=_texts(body["settings"]),
            changed=tuple(
                SettingsChange(
                    optimizer_step=int(row["optimizer_step"]),
                    changes={str(key): (str(old), str(new)) for key, (old, new) in row["changes"].items()},
                )
                for row in body["changed"]
            ),
        )


def going_on(
    known: RunIdentity, deciding: Mapping[str, str], settings: Mapping[str, str], *, optimizer_step: int
) -> RunIdentity:
    """Return the identity of a run that goes on at ``optimizer_step`` with these values.

    Raises ConfigError, naming each key with its old and new value, where they would give it another past.
    """
    refuse_another_past(known.deciding, deciding)
    current = known.current_settings
    changes = {
        key: (current.get(key, "null"), settings.get(key, "null"))
        for key in sorted(current.keys() | settings.keys())
        if current.get(key, "null") != settings.get(key, "null")
    }
    if not changes:
        return known
    change = SettingsChange(optimizer_step=optimizer_step, changes=changes)
    return RunIdentity(
        run_id=known.run_id,
        deciding=known.deciding,
        settings=known.settings,
        changed=(*known.changed, change),
    )


def refuse_another_past(known: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Raise ConfigError where a deciding value differs; a key that one side does not know is passed over."""
    differing = [
        f"  {key}: began with {known[key]}, got {given[key]}"
        for key in sorted(known.keys() & given.keys())
        if known[key] != given[key]
    ]
    if differing:
        raise ConfigError(
            "the run began with other values, and going on with these would give it another past:\n"
            + "\n".join(differing)
            + "\nset them back, or give a new run a name of its own (--set run.name=...)"
        )


def max_steps_course(identity: RunIdentity) -> tuple[tuple[int, int], ...]:
    """Return (from this optimizer step on, ``training.max_steps``) in order, as a learning rate follows."""
    first = identity.settings.get(MAX_STEPS)
    course = [] if first is None else [(0, int(json.loads(first)))]
    course += [
        (change.optimizer_step, int(json.loads(change.changes[MAX_STEPS][1])))
        for change in identity.changed
        if MAX_STEPS in change.changes
    ]
    return tuple(course)


def _texts(values: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in dict(values).items()}
