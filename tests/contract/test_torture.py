"""A short torture of the queue, as `make torture` does it for longer."""

from __future__ import annotations

import pytest

from tests.contract.torture import torture

pytestmark = pytest.mark.timeout(120)  # five seconds, and a minute at most until what waits is trained


@pytest.mark.req("Q-1", "Q-2", "Q-4", "Q-14")
def test_a_short_torture_loses_nothing_and_trains_nothing_twice() -> None:
    with torture(seed=1) as running:
        books = running.run(5.0)

    assert books.faults == [], books.table()
    assert books.trained >= books.taken > 0


@pytest.mark.req("Q-14")
def test_a_torture_notices_a_rollout_that_is_lost() -> None:
    with torture(seed=1) as running:
        (running.folder / "taken-by-nobody").write_text("gone\n")
        books = running.books()

    assert books.faults == ["lost: 1, such as gone"]
