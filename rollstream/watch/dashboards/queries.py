"""The forms of PromQL that the dashboards repeat."""

from __future__ import annotations

from typing import Final

ROLLOUTS_A_SECOND: Final = "suffix: rollouts/s"
TOKENS_A_SECOND: Final = "suffix: tokens/s"
SEGMENTS_A_SECOND: Final = "suffix: segments/s"
STEPS_A_SECOND: Final = "suffix: steps/s"
PACKS_A_SECOND: Final = "suffix: packs/s"
OBJECTS_A_SECOND: Final = "suffix: objects/s"
EVENTS_A_SECOND: Final = "suffix: /s"
RUN: Final = 'run="$run"'


def series(name: str, *matchers: str) -> str:
    """Return a selector of the run's series."""
    return f"{name}{{{', '.join((RUN, *matchers))}}}"


def rate(name: str, *matchers: str) -> str:
    """Return the rate of a counter, per second."""
    return f"rate({series(name, *matchers)}[$__rate_interval])"


def sum_rate(name: str, *matchers: str, by: str = "") -> str:
    """Return the sum of rates over processes that each count their own part."""
    return f"sum by ({by}) ({rate(name, *matchers)})" if by else f"sum({rate(name, *matchers)})"


def rank_rate(name: str, *matchers: str, by: str = "") -> str:
    """Return the rate of a counter that every learner rank reports for all ranks."""
    return f"max by ({by}) ({rate(name, *matchers)})" if by else f"max({rate(name, *matchers)})"


def mean(name: str, *matchers: str, by: str = "", over: str = "sum") -> str:
    """Return the mean of a histogram in the range, none where nothing was observed.

    ``over`` joins processes.
    """
    grouped = f"{over} by ({by}) " if by else f"{over} "
    top, bottom = rate(f"{name}_sum", *matchers), rate(f"{name}_count", *matchers)
    return f"{grouped}({top}) / ({grouped}({bottom}) > 0)"


def quantile(share: float, name: str, *matchers: str, by: str = "") -> str:
    """Return a quantile of a histogram in the range."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) ({rate(f'{name}_bucket', *matchers)}))"
