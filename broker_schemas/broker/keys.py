"""Names of keys, streams, groups and queues: built here and nowhere else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from broker_schemas.errors import ConfigError

RUN_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
MATCHER_GROUP: Final = "matcher"
PACKER_GROUP: Final = "packer"


@dataclass(frozen=True)
class RunKeys:
    """The keys of one run; they share a hash tag and so live in one slot of a cluster.

    Raises ConfigError for a run name that is not 1 to 63 of ``a-z 0-9 -``.
    """

    run: str

    def __post_init__(self) -> None:
        if not RUN_NAME.fullmatch(self.run):
            raise ConfigError(f"run name: got {self.run!r}, expected 1 to 63 characters of a-z, 0-9 and -")

    @property
    def prefix(self) -> str:
        return f"{{rollstream:{self.run}}}:"

    def named(self, name: str) -> str:
        """Return the key of a fixed name: segments, matched, events, counters, policy and so on."""
        return self.prefix + name

    def raw(self, record_id: str) -> str:
        """Where a producer puts the body of a rollout, with an expiry, for ``push_segments`` to admit."""
        return f"{self.prefix}raw:{record_id}"

    def body(self, record_id: str) -> str:
        """The body of a rollout that waits for its matcher."""
        return f"{self.prefix}body:{record_id}"

    def made(self, record_id: str) -> str:
        """Where a matcher puts a training segment, with an expiry, for ``commit_match`` to take."""
        return f"{self.prefix}made:{record_id}"

    def payload(self, record_id: str) -> str:
        return f"{self.prefix}payload:{record_id}"

    def ready(self, rank: int) -> str:
        return f"{self.prefix}ready:{rank}"

    def ready_versions(self, rank: int) -> str:
        """The policy versions of a rank's ready packs, sorted."""
        return f"{self.prefix}ready:{rank}:versions"

    @property
    def rollout_queue(self) -> str:
        """Name of the RQ queue of rollout jobs."""
        return f"rollstream-{self.run}-rollouts"
