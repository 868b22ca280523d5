"""Version lag at three stages, folded from the log: when generated, when packed, when claimed.

Exact, because the log holds publications and rollouts in the order in which they happened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from prometheus_client.core import HistogramMetricFamily, Metric

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.records.events import LogEvent

BUCKETS: Final = (0, 1, 2, 3, 4, 6, 8, 12, 16)
STAGES: Final = ("generated", "packed", "claimed")


class VersionLag:
    """Counts of lags by stage: of rollouts when they arrived, of packs (their lowest version) afterwards."""

    def __init__(self, policy_version: int) -> None:
        self._policy_version = policy_version
        self._lags: dict[str, Counter[int]] = {stage: Counter() for stage in STAGES}

    def fold(self, event: LogEvent) -> None:
        """Take in the next event of the log."""
        if event.kind == "policy_published":
            self._policy_version = max(self._policy_version, event.number("policy_version"))
        elif event.kind == "pushed":
            for row in event.pushed_rows():
                self._note("generated", self._policy_version - row.policy_version)
        elif event.kind == "packed":
            self._note("packed", self._policy_version - event.number("policy_version"))
        elif event.kind == "claimed":
            for pack in event.claimed_packs():
                self._note("claimed", event.number("policy_version") - pack.policy_version)

    def _note(self, stage: str, lag_versions: int) -> None:
        self._lags[stage][max(lag_versions, 0)] += 1

    def families(self) -> Iterator[Metric]:
        """Yield the histogram; all stages are there from the start, with zero counts."""
        family = HistogramMetricFamily(
            "rollstream_lag_versions",
            "Policy version in force minus the rollout's (generated) or the pack's lowest (packed, claimed).",
            labels=["stage"],
        )
        for stage, lags in self._lags.items():
            below = [(str(float(top)), sum(n for lag, n in lags.items() if lag <= top)) for top in BUCKETS]
            total = sum(lag * number for lag, number in lags.items())
            family.add_metric([stage], [*below, ("+Inf", lags.total())], sum_value=total)
        yield family


def end_of_log(broker: Broker) -> str:
    """Return the id of the last event, ``0-0`` for an empty log; raises BrokerError."""
    with broker_errors("reading the end of the log"):
        last: Any = broker.client.xrevrange(broker.keys.named("events"), count=1)
    return last[0][0].decode() if last else "0-0"
