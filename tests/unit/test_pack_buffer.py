"""The pack buffer: admission, waiting, carrying over, discarding."""

from __future__ import annotations

import random

import pytest

from broker_schemas.records.packs import MatchedDescriptor
from consumers.pack_buffer import PackBuffer, PackBufferFull, PackBufferSettings, Urgency
from consumers.packing import OversizedSegment, PackingError, select_pack
from tests.builders.records import a_descriptor

DEFAULTS = {"capacity_tokens": 100, "packing_buffer": 512, "min_fill_ratio": 0.65, "method": "exact"}


def a_segment(record_id: str = "s", encoded_length: int = 10, policy_version: int = 0) -> MatchedDescriptor:
    return a_descriptor(record_id, encoded_length=encoded_length, policy_version=policy_version)


def buffered_tokens(buffer: PackBuffer) -> int:
    return sum(segment.encoded_length for segment in buffer.segments)


def a_buffer(*lengths: int, **settings: object) -> PackBuffer:
    buffer = PackBuffer(PackBufferSettings(**{**DEFAULTS, **settings}))  # type: ignore[arg-type]
    for number, length in enumerate(lengths):
        assert buffer.insert(a_segment(f"s{number}", length))
    return buffer


@pytest.mark.req("P-4")
def test_an_oversized_segment_is_refused_when_inserted_and_changes_nothing() -> None:
    buffer = a_buffer(30)

    with pytest.raises(OversizedSegment, match=r"big: got 101 tokens.*100.*raise training.global_max_length"):
        buffer.insert(a_segment("big", 101))

    assert [segment.record_id for segment in buffer.segments] == ["s0"]
    assert buffered_tokens(buffer) == 30


@pytest.mark.req("P-4")
def test_a_full_buffer_refuses_and_is_not_changed() -> None:
    buffer = a_buffer(1, 2, packing_buffer=2)
    before = buffer.segments

    with pytest.raises(
        PackBufferFull, match=r"late: .*holds 2 segments, expected fewer than 2.*packing_buffer"
    ):
        buffer.insert(a_segment("late", 3))

    assert buffer.segments == before
    assert buffer.num_free_places == 0


def test_a_redelivered_segment_is_not_inserted_twice() -> None:
    buffer = a_buffer(10)

    assert not buffer.insert(a_segment("s0", 10))
    assert len(buffer) == 1


def test_a_segment_without_tokens_is_refused() -> None:
    with pytest.raises(PackingError, match="empty: got 0 tokens, expected at least 1"):
        a_buffer().insert(a_segment("empty", 0))


@pytest.mark.req("P-5")
def test_leftovers_are_carried_into_the_next_pack() -> None:
    buffer = a_buffer(60, 50, 40)

    first = buffer.next_pack()
    assert first is not None
    assert first.pack.record_ids == ("s0", "s2")
    assert (first.reason, first.pack.fill, first.num_left_segments) == ("filled", 1.0, 1)

    assert buffer.next_pack() is None
    buffer.insert(a_segment("s3", 49))
    second = buffer.next_pack()
    assert second is not None
    assert second.pack.record_ids == ("s1", "s3")
    assert len(buffer) == 0


@pytest.mark.req("P-5")
def test_a_patient_packer_waits_below_the_target_fill() -> None:
    buffer = a_buffer(60, 37)

    assert buffer.next_pack() is None
    assert len(buffer) == 2


@pytest.mark.req("P-5")
def test_a_patient_packer_stops_waiting_when_enough_packs_worth_of_tokens_wait() -> None:
    buffer = a_buffer(51, 52, 53, lookahead_packs=2)
    assert buffer.next_pack() is None

    buffer.insert(a_segment("s3", 54))
    choice = buffer.next_pack()

    assert choice is not None
    assert (choice.pack.record_ids, choice.reason) == (("s0",), "lookahead")


@pytest.mark.req("P-5")
def test_a_full_buffer_gives_its_best_pack_so_that_insertion_can_go_on() -> None:
    buffer = a_buffer(1, 2, packing_buffer=2)

    choice = buffer.next_pack()

    assert choice is not None
    assert choice.reason == "buffer_full"
    assert buffer.num_free_places == 2


@pytest.mark.req("P-5")
def test_a_hungry_learner_gets_a_pack_from_the_minimum_fill_on_and_none_below() -> None:
    assert a_buffer(64).next_pack("hungry") is None

    choice = a_buffer(65).next_pack("hungry")

    assert choice is not None
    assert choice.reason == "hungry"


@pytest.mark.req("P-5")
def test_a_forced_pack_leaves_at_any_fill() -> None:
    choice = a_buffer(5).next_pack("forced")

    assert choice is not None
    assert (choice.reason, choice.pack.fill) == ("forced", 0.05)


def test_an_empty_buffer_has_no_pack_however_urgent() -> None:
    buffer = a_buffer()

    assert [buffer.next_pack(urgency) for urgency in ("patient", "hungry", "forced")] == [None] * 3


def test_a_pack_carries_the_lowest_policy_version() -> None:
    buffer = a_buffer()
    buffer.insert(a_segment("new", 50, policy_version=7))
    buffer.insert(a_segment("old", 50, policy_version=4))

    choice = buffer.next_pack()

    assert choice is not None
    assert choice.pack.policy_version == 4
    assert choice.pack.total_tokens == 100


@pytest.mark.req("Q-5")
def test_discarded_segments_are_returned_oldest_first_and_the_rest_keeps_its_order() -> None:
    buffer = a_buffer()
    for number, version in enumerate([3, 1, 4, 2]):
        buffer.insert(a_segment(f"s{number}", 10, policy_version=version))

    removed = buffer.discard(lambda segment: segment.policy_version < 3)

    assert [segment.record_id for segment in removed] == ["s1", "s3"]
    assert [segment.record_id for segment in buffer.segments] == ["s0", "s2"]
    assert buffered_tokens(buffer) == 20
    assert buffer.insert(a_segment("s1", 10))


def test_segments_put_back_go_first_and_once() -> None:
    buffer = a_buffer(60, 50, 40)
    choice = buffer.next_pack()
    assert choice is not None

    buffer.put_back(choice.segments)
    buffer.put_back(choice.segments[:1])

    assert [segment.record_id for segment in buffer.segments] == ["s0", "s2", "s1"]
    assert buffered_tokens(buffer) == 150


@pytest.mark.parametrize(
    "wrong",
    [
        {"capacity_tokens": 0},
        {"packing_buffer": 0},
        {"lookahead_packs": 0},
        {"min_fill_ratio": 0.99},
        {"target_fill_ratio": 1.1},
        {"method": "best"},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(PackingError, match="got"):
        a_buffer(**wrong)


@pytest.mark.req("P-1", "P-2", "P-5")
@pytest.mark.parametrize("seed", range(60))
def test_random_traffic_loses_nothing_and_every_pack_is_what_selection_says(seed: int) -> None:
    generator = random.Random(seed)
    buffer = a_buffer(packing_buffer=12, lookahead_packs=generator.randint(1, 3))
    inserted: list[str] = []
    left: list[str] = []

    for number in range(200):
        if buffer.num_free_places:
            inserted.append(f"s{number}")
            buffer.insert(a_segment(f"s{number}", generator.randint(1, 100)))
        held = buffer.segments
        choice = buffer.next_pack(generator.choice(["patient", "patient", "hungry", "forced"]))
        if choice is None:
            assert buffer.segments == held
            continue
        chosen = select_pack([segment.encoded_length for segment in held], 100)
        assert choice.segments == tuple(held[i] for i in chosen)
        assert choice.segments[0] == held[0]
        left.extend(choice.pack.record_ids)

    assert sorted(left + [segment.record_id for segment in buffer.segments]) == sorted(inserted)


@pytest.mark.req("P-13")
def test_a_full_pack_of_old_segments_leaves_without_a_young_one_that_came_before_them() -> None:
    buffer = a_buffer()
    for name, length, version in (("young", 60, 5), ("old", 60, 2), ("young-too", 40, 5), ("old-too", 40, 3)):
        buffer.insert(a_segment(name, length, policy_version=version))

    first, second = buffer.next_pack(), buffer.next_pack()

    assert first is not None
    assert second is not None
    assert (first.pack.record_ids, first.pack.policy_version) == (("old", "old-too"), 2)
    assert (second.pack.record_ids, second.pack.policy_version) == (("young", "young-too"), 5)


@pytest.mark.req("P-13")
@pytest.mark.parametrize("urgency", ["hungry", "forced"])
def test_a_hungry_learner_gets_the_old_ones_alone_where_they_fill_a_pack_enough(urgency: Urgency) -> None:
    buffer = a_buffer()
    for name, length, version in (("young", 30, 5), ("old", 40, 2), ("old-too", 30, 2)):
        buffer.insert(a_segment(name, length, policy_version=version))

    choice = buffer.next_pack(urgency)

    assert choice is not None
    assert choice.pack.record_ids == ("old", "old-too")


@pytest.mark.req("P-13")
def test_a_young_one_joins_where_the_old_ones_alone_are_too_few() -> None:
    buffer = a_buffer()
    buffer.insert(a_segment("old", 40, policy_version=2))
    buffer.insert(a_segment("young", 50, policy_version=5))
    assert buffer.next_pack() is None

    choice = buffer.next_pack("hungry")

    assert choice is not None
    assert choice.pack.record_ids == ("old", "young")


@pytest.mark.req("P-13", "P-1")
@pytest.mark.parametrize("seed", range(40))
def test_in_any_traffic_the_stalest_leaves_first_and_young_ones_join_only_where_they_must(seed: int) -> None:
    generator = random.Random(seed)
    buffer = a_buffer(packing_buffer=24, lookahead_packs=3)
    for number in range(200):
        if buffer.num_free_places:
            version = number // 10 - generator.randint(0, 3)
            buffer.insert(a_segment(f"s{number}", generator.randint(1, 100), policy_version=max(0, version)))
        held = buffer.segments
        urgency: Urgency = generator.choice(["patient", "hungry", "forced"])
        choice = buffer.next_pack(urgency)
        if choice is None:
            continue
        stalest = min(held, key=lambda segment: segment.policy_version)
        assert stalest in choice.segments
        assert choice.pack.fill <= 1
        assert list(choice.segments) == [segment for segment in held if segment in choice.segments]


def versions_dragged(seed: int, *, is_version_known: bool) -> tuple[float, float]:
    """Return by how many versions packs make their segments older, and how full they are, on average.

    A rollout takes 1 to 4 versions to arrive; 12 arrive in each version, six at a time.
    """
    generator = random.Random(seed)
    buffer = a_buffer()
    versions: dict[str, int] = {}
    dragged, fills = [], []
    for number in range(600):
        name = f"s{number}"
        versions[name] = number // 12 + 4 - generator.randint(1, 4)
        known = versions[name] if is_version_known else 0
        buffer.insert(a_segment(name, generator.randint(5, 60), policy_version=known))
        while number % 6 == 5 and (choice := buffer.next_pack("hungry")):
            held = [versions[item] for item in choice.pack.record_ids]
            dragged += [version - min(held) for version in held]
            fills.append(choice.pack.fill)
    return sum(dragged) / len(dragged), sum(fills) / len(fills)


@pytest.mark.req("P-13")
@pytest.mark.parametrize("seed", range(3))
def test_packs_for_a_hungry_learner_make_their_segments_less_old(seed: int) -> None:
    with_versions, fill = versions_dragged(seed, is_version_known=True)
    without, plain_fill = versions_dragged(seed, is_version_known=False)
    assert with_versions < 0.6 * without
    assert plain_fill > fill > 0.85


@pytest.mark.req("P-5")
@pytest.mark.parametrize("seed", range(5))
def test_a_patient_packer_reaches_a_high_fill(seed: int) -> None:
    generator = random.Random(seed)
    buffer = a_buffer(capacity_tokens=16384)
    fills: list[float] = []

    for number in range(600):
        buffer.insert(a_segment(f"s{number}", min(16384, int(generator.lognormvariate(7.6, 0.67)) + 1)))
        while choice := buffer.next_pack():
            fills.append(choice.pack.fill)

    assert len(fills) > 50
    assert sum(fills) / len(fills) > 0.98
