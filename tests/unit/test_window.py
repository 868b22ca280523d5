"""Window scope: exactly the wanted packs, or the reason why not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumers.packing import PackingError
from consumers.window import InfeasibleWindow, WindowSearchExhausted, longest_first, schedule_window


def is_feasible_by_brute_force(lengths: list[int], capacity: int, num_packs: int) -> bool:
    """Follow every way to place the segments, as the set of all reachable (sorted) pack loads."""
    if len(lengths) < num_packs:
        return False
    states = {(0,) * num_packs}
    for length in lengths:
        states = {
            tuple(sorted((*loads[:i], loads[i] + length, *loads[i + 1 :])))
            for loads in states
            for i in range(num_packs)
            if loads[i] + length <= capacity
        }
    return bool(states) and any(all(loads) for loads in states)


def cut_into_two_or_three(seed: int, capacity: int, num_packs: int, fill: float) -> list[int]:
    """Return the lengths of a window that has a division: each pack filled to ``fill`` by two or three."""
    rng = random.Random(seed)
    tokens = int(capacity * fill)
    lengths: list[int] = []
    for _ in range(num_packs):
        cuts = sorted(rng.sample(range(1, tokens), rng.choice((1, 2))))
        lengths += [end - start for start, end in zip([0, *cuts], [*cuts, tokens], strict=True)]
    rng.shuffle(lengths)
    return lengths


@pytest.mark.req("P-7")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("capacity", "num_packs"), [(1024, 25), (4096, 40), (16384, 54)])
def test_many_packs_of_two_or_three_segments_at_99_percent_are_divided(
    seed: int, capacity: int, num_packs: int
) -> None:
    lengths = cut_into_two_or_three(seed, capacity, num_packs, 0.99)
    packs = schedule_window(lengths, capacity, num_packs)
    assert_is_a_division(packs, lengths, capacity, num_packs)
    assert packs == schedule_window(lengths, capacity, num_packs)


def assert_is_a_division(packs: list[list[int]], lengths: list[int], capacity: int, num_packs: int) -> None:
    assert len(packs) == num_packs
    assert all(packs)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= capacity for pack in packs)
    assert all(pack == sorted(pack) for pack in packs)
    assert packs == sorted(packs)


def a_random_window(generator: random.Random) -> tuple[list[int], int, int]:
    """Up to 12 segments and 4 packs, tight around what fits."""
    num_packs, num_segments = generator.randint(1, 4), generator.randint(1, 12)
    capacity = generator.randint(5, 40)
    longest = max(
        1, min(capacity, round(2 * capacity * num_packs / num_segments * generator.uniform(0.5, 1)))
    )
    return [generator.randint(1, longest) for _ in range(num_segments)], capacity, num_packs


@pytest.mark.req("P-6", "P-7")
def test_a_window_is_refused_exactly_when_brute_force_finds_no_division() -> None:
    generator = random.Random(0)
    outcomes = {"balanced": 0, "searched": 0, "fewer_segments_than_packs": 0, "indivisible": 0}
    outcomes["sum_over_capacity"] = 0

    for _ in range(8000):
        lengths, capacity, num_packs = a_random_window(generator)
        try:
            packs = schedule_window(lengths, capacity, num_packs)
        except InfeasibleWindow as error:
            assert not is_feasible_by_brute_force(lengths, capacity, num_packs), (
                lengths,
                capacity,
                num_packs,
            )
            outcomes[error.reason] += 1
        else:
            assert_is_a_division(packs, lengths, capacity, num_packs)
            is_balanced = longest_first(lengths, capacity, num_packs) is not None
            outcomes["balanced" if is_balanced else "searched"] += 1

    assert min(outcomes.values()) >= 20, outcomes


@pytest.mark.req("P-7")
@pytest.mark.parametrize("is_search_alone", [False, True])
def test_a_window_without_any_slack_is_divided(
    is_search_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_search_alone:
        monkeypatch.setattr("consumers.window._one_by_one", lambda *_: None)
    generator = random.Random(1)
    num_found = 0

    for _ in range(150):
        num_packs, capacity = 4, 100
        lengths: list[int] = []
        for _ in range(num_packs):  # cut full packs into three, so that a division without any slack exists
            first, second = sorted(generator.sample(range(10, 91), 2))
            lengths += [first, second - first, capacity - second]
        generator.shuffle(lengths)
        packs = schedule_window(lengths, capacity, num_packs)
        assert_is_a_division(packs, lengths, capacity, num_packs)
        num_found += longest_first(lengths, capacity, num_packs) is None

    assert num_found > 100


TIGHT = json.loads((Path(__file__).parents[1] / "golden" / "tight_windows.json").read_text("utf-8"))


@pytest.mark.req("P-7")
@pytest.mark.parametrize("window", TIGHT)
def test_a_window_that_greedy_choices_cannot_divide_is_divided(window: dict[str, Any]) -> None:
    lengths, capacity, num_packs = window["lengths"], window["capacity"], window["num_packs"]
    assert_is_a_division(schedule_window(lengths, capacity, num_packs), lengths, capacity, num_packs)


def full_packs(rng: random.Random, num_packs: int, capacity: int, fill: float, per_pack: int) -> list[int]:
    """Cut packs of that fill into about so many segments each, of lengths that vary."""
    lengths: list[int] = []
    for _ in range(num_packs):
        shares = [rng.lognormvariate(0, 0.5) for _ in range(max(1, per_pack + rng.randint(-1, 1)))]
        load = int(capacity * fill)
        parts = [max(1, int(load * share / sum(shares))) for share in shares]
        parts[0] += load - sum(parts)
        lengths += parts if min(parts) > 0 else [load]
    rng.shuffle(lengths)
    return lengths


@pytest.mark.req("P-7")
@pytest.mark.parametrize("capacity", [1024, 16384])
@pytest.mark.parametrize("num_packs, per_pack", [(3, 9), (4, 7), (5, 5), (8, 3), (12, 2)])
def test_every_window_of_up_to_32_segments_is_divided_at_any_fill(
    num_packs: int, per_pack: int, capacity: int
) -> None:
    rng = random.Random(f"{num_packs} {capacity}")
    for fill in (0.99, 0.995, 1.0, 1.0, 1.0):
        for _ in range(6):
            lengths = full_packs(rng, num_packs, capacity, fill, per_pack)
            if len(lengths) <= 32:
                packs = schedule_window(lengths, capacity, num_packs)
                assert_is_a_division(packs, lengths, capacity, num_packs)


@pytest.mark.req("P-7")
@pytest.mark.parametrize("num_packs, per_pack", [(16, 3), (42, 12), (64, 8), (120, 4)])
def test_a_large_window_of_99_percent_is_divided(num_packs: int, per_pack: int) -> None:
    rng = random.Random(num_packs)
    lengths = full_packs(rng, num_packs, 16384, 0.99, per_pack)[:512]
    assert_is_a_division(schedule_window(lengths, 16384, num_packs), lengths, 16384, num_packs)


@pytest.mark.req("P-6")
@given(
    lengths=st.lists(st.integers(1, 50), min_size=4, max_size=40),
    num_packs=st.integers(1, 4),
)
@settings(max_examples=150, deadline=None)
def test_roomy_windows_are_balanced_within_the_longest_segment(lengths: list[int], num_packs: int) -> None:
    capacity = sum(lengths)

    packs = schedule_window(lengths, capacity, num_packs)

    assert_is_a_division(packs, lengths, capacity, num_packs)
    loads = [sum(lengths[i] for i in pack) for pack in packs]
    assert max(loads) - min(loads) <= max(lengths)
    assert schedule_window(list(lengths), capacity, num_packs) == packs


@pytest.mark.req("P-6")
def test_a_searched_division_is_evened_out_and_leaves_no_pack_empty() -> None:
    lengths = [7, 7, 6, 6, 6, 4]  # longest first puts 7 + 6 + ... over 19; 7 + 7 + 4 and 6 + 6 + 6 fit
    assert longest_first(lengths, 18, 2) is None

    assert schedule_window(lengths, 18, 2) == [[0, 1, 5], [2, 3, 4]]


@pytest.mark.req("P-6")
@pytest.mark.parametrize("is_search_alone", [False, True])
def test_what_the_balanced_heuristic_misses_is_evened_out_as_well(
    is_search_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consumers.window.longest_first", lambda *_: None)
    if is_search_alone:
        monkeypatch.setattr("consumers.window._one_by_one", lambda *_: None)
    generator = random.Random(5)

    for _ in range(200):
        num_packs = generator.randint(1, 4)
        lengths = [generator.randint(1, 50) for _ in range(generator.randint(num_packs, 20))]
        packs = schedule_window(lengths, sum(lengths), num_packs)  # all would fit into the first pack

        assert_is_a_division(packs, lengths, sum(lengths), num_packs)
        loads = [sum(lengths[i] for i in pack) for pack in packs]
        assert max(loads) - min(loads) <= max(lengths)


@pytest.mark.req("P-6")
def test_a_real_window_at_97_percent_is_divided() -> None:
    generator = random.Random(3)
    lengths: list[int] = []
    while sum(lengths) < 0.97 * 8 * 16384:
        lengths.append(generator.randint(2000, 6000))
    lengths.pop()

    packs = schedule_window(lengths, 16384, 8)

    assert_is_a_division(packs, lengths, 16384, 8)
    assert schedule_window(lengths, 16384, 8) == packs


@pytest.mark.req("P-7")
@pytest.mark.parametrize(
    ("lengths", "capacity", "num_packs", "reason", "message"),
    [
        (
            [9, 9, 9],
            10,
            2,
            "sum_over_capacity",
            "got 27 tokens, expected at most 20; lower training.effective_b",
        ),
        (
            [9],
            10,
            2,
            "fewer_segments_than_packs",
            "got 1 segments, expected at least 2.*raise training.effective",
        ),
        ([], 10, 1, "fewer_segments_than_packs", "got 0 segments, expected at least 1"),
        (
            [6, 6, 6],
            10,
            2,
            "indivisible",
            "got 18 tokens, which would fit into 20, but no division.*longest 6",
        ),
        ([11, 1], 10, 2, "indivisible", "index 0: got 11 tokens, expected at most the pack capacity of 10"),
    ],
)
def test_each_infeasible_window_says_why_and_what_to_change(
    lengths: list[int], capacity: int, num_packs: int, reason: str, message: str
) -> None:
    with pytest.raises(InfeasibleWindow, match=message) as caught:
        schedule_window(lengths, capacity, num_packs)

    assert caught.value.reason == reason


@pytest.mark.req("P-7")
def test_an_undecided_search_does_not_claim_that_the_window_is_infeasible() -> None:
    with pytest.raises(WindowSearchExhausted, match="took 1 steps without an answer, so .* may or may not"):
        schedule_window([4, 4, 4, 4, 4], 10, 2, max_search_work=1)
    with pytest.raises(InfeasibleWindow):
        schedule_window([4, 4, 4, 4, 4], 10, 2, max_search_work=1000)


def test_a_window_without_packs_is_refused() -> None:
    with pytest.raises(PackingError, match="number of packs in a window: got 0, expected at least 1"):
        schedule_window([1], 10, 0)
