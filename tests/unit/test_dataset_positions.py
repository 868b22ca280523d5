"""Which samples a step trains: from seed and step alone, whatever the world size and accumulation."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.dataset_positions import plan_rows, sample_indices, share_of_rank


def indices(optimizer_step: int, *, batch: int = 3, num_samples: int = 7, seed: int = 5) -> tuple[int, ...]:
    return sample_indices(
        optimizer_step=optimizer_step, effective_batch_size=batch, num_samples=num_samples, seed=seed
    )


def test_each_epoch_visits_every_sample_once_in_another_order() -> None:
    walked = list(chain.from_iterable(indices(step) for step in range(7)))
    epochs = [walked[0:7], walked[7:14], walked[14:21]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.req("Q-10")
def test_a_step_asked_for_alone_is_the_step_of_the_walk() -> None:
    walked = [indices(step) for step in range(20)]
    assert indices(13) == walked[13]
    assert indices(13, seed=6) != walked[13]


def test_a_batch_larger_than_the_data_set_takes_samples_again() -> None:
    assert sorted(indices(0, batch=4, num_samples=2)) == [0, 0, 1, 1]


@pytest.mark.parametrize("changes", [{"num_samples": 0}, {"batch": 0}])
def test_an_empty_data_set_or_batch_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="sample indices"):
        indices(0, **changes)


@settings(deadline=None, max_examples=50)
@given(num_items=st.integers(0, 60), world_size=st.integers(1, 9))
def test_shares_cover_everything_once_in_order_and_differ_by_one_at_most(
    num_items: int, world_size: int
) -> None:
    shares = [share_of_rank(num_items, rank, world_size) for rank in range(world_size)]
    assert list(chain.from_iterable(shares)) == list(range(num_items))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    num_micro_steps=st.integers(1, 6),
    capacity=st.integers(50, 120),
)
def test_rows_hold_every_segment_once_in_order_within_capacity(
    lengths: list[int], num_micro_steps: int, capacity: int
) -> None:
    rows = plan_rows(lengths, capacity_tokens=capacity, num_micro_steps=num_micro_steps)
    assert list(chain.from_iterable(rows)) == list(range(len(lengths)))
    assert all(row and sum(lengths[index] for index in row) <= capacity for row in rows)
    if sum(lengths) <= capacity:
        assert len(rows) == min(num_micro_steps, len(lengths))


@pytest.mark.req("P-4")
def test_a_segment_above_the_capacity_is_refused_by_its_place() -> None:
    with pytest.raises(ValueError, match="segment 1: 60 tokens, expected at most 50"):
        plan_rows([10, 60], capacity_tokens=50, num_micro_steps=1)
