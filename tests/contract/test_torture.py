"""A short torture of the queue, as `make torture` does it for longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollstream.stack.embedded_redis import Durability
from tests.torture.campaign import torture
from tests.torture.gauges import LEAST_SAMPLES, GaugeFile
from tests.torture.log_fold import LIFE, Fact, lives_of

pytestmark = pytest.mark.timeout(
    240
)  # some seconds, and a minute and a half at most until what waits is done


@pytest.mark.req("Q-1", "Q-2", "Q-4", "Q-14")
@pytest.mark.parametrize("durability", ["always", "everysec"])
def test_a_short_torture_loses_nothing_and_trains_nothing_twice(
    tmp_path: Path, durability: Durability
) -> None:
    with torture(tmp_path / "torture", seed=1, durability=durability) as running:
        books = running.run(4.0)
        (running.folder / "taken-by-nobody").write_text("gone\n")
        later = running.read_books()

    assert books.faults == [], books.table()
    assert books.rows["trained"] > 0
    assert later.faults == ["lost: 1, such as gone"]


def test_a_life_that_the_log_tells_twice_is_seen() -> None:
    facts = [
        Fact("1-0", "requested", ("a", "b", "c")),
        Fact("2-0", "pushed", ("a", "b")),
        Fact("3-0", "request_failed", ("b", "c")),
        Fact("4-0", "matched", ("a", "b")),
        Fact("5-0", "packed", ("a", "b")),
        Fact("6-0", "claimed", ("a", "b")),
        Fact("7-0", "claimed", ("b",)),
    ]

    lives = lives_of(facts)

    assert lives == {"a": "apmkc", "b": "apmkcc", "c": "af"}
    assert {name for name, life in lives.items() if not LIFE.fullmatch(life)} == {"b"}


def test_what_grows_is_seen_and_what_stays_is_not(tmp_path: Path) -> None:
    gauges = GaugeFile(tmp_path / "gauges.jsonl")
    for number in range(LEAST_SAMPLES):
        gauges.write(number, {"consumers matcher": 2.0, "descriptors pack": 10.0 + 2 * number})

    assert gauges.growth() == ["descriptors pack grows: 45 in the second quarter, 93 in the last"]
