"""No record costs a matcher more than its bound: counted before work, rejected alone, named [Q-12, Q-13]."""

from __future__ import annotations

import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.matcher_door import MatcherDoor
from broker_schemas.broker.policy import publish_policy
from broker_schemas.broker.status import read_status
from broker_schemas.client import SegmentSink, segment_line
from broker_schemas.method.image_check import ImageCheck
from broker_schemas.method.image_grid import ImageGrid
from broker_schemas.records.records import MAX_BINS, MAX_OBJECTS, GroundTruthObject, ImageReference
from consumers import matcher as matching
from tests.builders.rollouts import make_rollout
from tests.contract.test_hostile_input import a_matcher, match_all_and_check, push_line
from tests.contract.test_lost_replies import lose_reply

BOX = GroundTruthObject(desc="cell", geometry="bbox_2d", bins=(10, 20, 30, 40))


def reason_of(broker: Broker, record: Any, line: str | None = None) -> str:
    assert push_line(broker, line or segment_line(record), record.encode_body()) == "ok"
    (letter,) = match_all_and_check(broker)
    return letter[b"reason"].decode()


@pytest.mark.req("Q-13")
@pytest.mark.parametrize("num_objects", [MAX_OBJECTS + 1, 6_000, 65_536])
def test_a_payload_of_too_many_objects_is_rejected_before_any_work(
    real_broker: Broker, num_objects: int
) -> None:
    record = make_rollout(record_id="a", assistant_payload=(BOX,) * num_objects)
    started_s = time.process_time()
    assert reason_of(real_broker, record) == "malformed"
    assert time.process_time() - started_s < 5


@pytest.mark.req("Q-13")
def test_what_cannot_fit_a_pack_is_rejected_before_it_is_matched(
    real_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consumers.record_matching.match_objects", lambda *_: pytest.fail("it was matched"))
    record = make_rollout(record_id="a", assistant_payload=(BOX,) * MAX_OBJECTS)
    assert reason_of(real_broker, record) == "segment_too_long"


@pytest.mark.req("Q-13")
def test_a_polygon_of_too_many_vertices_is_rejected(real_broker: Broker) -> None:
    polygon = GroundTruthObject(desc="cell", geometry="poly", bins=tuple(range(10)) * (MAX_BINS // 10 + 1))
    assert reason_of(real_broker, make_rollout(record_id="a", assistant_payload=(polygon,))) == "malformed"


@pytest.mark.req("Q-13", "M-11")
@pytest.mark.parametrize("bins", [(30, 20, 10, 40), (10, 40, 30, 20), (10, 20, 10, 40), (10, 20, 30, 20)])
def test_an_inverted_or_empty_box_is_no_ground_truth(real_broker: Broker, bins: Any) -> None:
    record = make_rollout(record_id="a", assistant_payload=(replace(BOX, bins=bins),))
    assert reason_of(real_broker, record) == "ground_truth_malformed"


@pytest.mark.req("Q-13")
@pytest.mark.parametrize("error", [MemoryError("32 GiB"), RecursionError("deep"), ZeroDivisionError("0")])
def test_any_error_in_judging_a_record_rejects_that_record_alone(
    real_broker: Broker, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    judged = matching.match_record

    def fail_for_one(record: Any, tools: Any) -> Any:
        if record.record_id == "a":
            raise error
        return judged(record, tools)

    monkeypatch.setattr(matching, "match_record", fail_for_one)
    SegmentSink(real_broker).push([make_rollout(record_id="b")])
    assert reason_of(real_broker, make_rollout(record_id="a")) == "judging_failed"
    assert read_status(real_broker, 1).total("matched") == 1


@pytest.mark.req("Q-13")
def test_a_record_pending_through_two_deaths_is_rejected_and_its_neighbours_are_not(
    real_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        """The end of the process."""

    judged = matching.match_record

    def die_over_one(record: Any, tools: Any) -> Any:
        if record.record_id == "b":
            raise Died
        return judged(record, tools)

    monkeypatch.setattr(matching, "match_record", die_over_one)
    SegmentSink(real_broker).push([make_rollout(record_id=name) for name in "abc"])
    for _ in range(2):
        with pytest.raises(Died):
            a_matcher(real_broker).step(0.0)
    third = a_matcher(real_broker)
    while read_status(real_broker, 1).segments_waiting:
        third.step(0.0)
    status = read_status(real_broker, 1)
    assert (status.total("matched"), status.by_reason("rejected")) == (2, {"killed_its_matcher": 1})
    assert real_broker.client.hlen(real_broker.keys.named("tries")) == 0


@pytest.mark.req("Q-13", "Q-4")
def test_a_broker_that_is_away_is_no_death(real_broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    SegmentSink(real_broker).push([make_rollout(record_id="a")])
    lose_reply(real_broker, "segments", "matcher", "m-0", 1)
    matcher = a_matcher(real_broker)
    for _ in range(3):
        with monkeypatch.context() as away:
            away.setattr(MatcherDoor, "prepare_commit", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                matcher.step(0.0)
        matcher._door.look_again()
    matcher.step(0.0)
    assert read_status(real_broker, 1).total("matched") == 1


@pytest.mark.req("Q-13", "Q-14")
@pytest.mark.parametrize(
    ("place", "value"),
    [(2, "r-9"), (3, "7"), (4, "poly"), (5, "another"), (6, "5"), (7, "evaluation"), (8, "3")],
)
def test_a_line_that_differs_from_its_body_is_refused(real_broker: Broker, place: int, value: str) -> None:
    record = make_rollout(record_id="a")
    columns = segment_line(record).split("\t")
    columns[place] = value
    if place == 2:
        record = replace(record, request_id="r-1")
        columns[place] = ""
    assert reason_of(real_broker, record, "\t".join(columns)) == "line_differs"


@pytest.mark.req("Q-12", "Q-14")
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (1, "9" * 16),
        (3, "9" * 5_000),
        (4, "x" * 1_000_000),
        (5, "x" * 801),
        (6, "9" * 16),
        (7, "both"),
        (8, "-" + "9" * 16),
    ],
)
def test_a_line_of_absurd_size_is_refused(real_broker: Broker, place: int, value: str) -> None:
    record = make_rollout(record_id="a")
    columns = segment_line(record).split("\t")
    columns[place] = value
    assert push_line(real_broker, "\t".join(columns), record.encode_body()) == "bad_id"


@pytest.mark.req("Q-5", "Q-13")
def test_a_version_above_the_current_one_is_not_admitted(real_broker: Broker) -> None:
    publish_policy(real_broker, policy_version=3, optimizer_step=0, weights_path="w")
    assert reason_of(real_broker, make_rollout(record_id="a", policy_version=4)) == "version_unknown"
    spans = ((3, 1), (10**15, len(make_rollout().response_token_ids) - 1))
    record = make_rollout(record_id="b", policy_version=3, version_spans=spans)
    assert reason_of(real_broker, record) == "version_unknown"


RULE = ImageGrid(patch_size=16, merge_size=2, min_pixels=1, max_pixels=1 << 20)


@pytest.mark.req("Q-13")
def test_an_image_is_looked_at_as_the_learner_will(tmp_path: Path) -> None:
    Image.new("RGB", (128, 64)).save(tmp_path / "a.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.png").write_text("no image")
    check = ImageCheck(tmp_path, RULE)
    good = ImageReference(path="a.png", width=128, height=64, grid_thw=(1, 4, 8))
    assert check.problem(good) is None
    whole = BytesIO()
    Image.effect_noise((128, 64), 90).convert("RGB").save(whole, "JPEG")
    (tmp_path / "torn.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    for path in (
        "gone.png",
        "folder.png",
        "text.png",
        "torn.jpg",
        "http://h/a.png",
        "../a.png",
        "a\0b",
        "x" * 300,
    ):
        assert check.problem(replace(good, path=path)), path
    assert "expected 64x128" in str(check.problem(replace(good, width=64, height=128)))
    assert "expected (1, 4, 8)" in str(check.problem(replace(good, grid_thw=(1, 8, 4))))
    (tmp_path / "a.png").unlink()
    assert check.problem(good)


@pytest.mark.req("Q-13")
def test_a_rollout_whose_image_the_learner_cannot_open_is_not_admitted(
    real_broker: Broker, tmp_path: Path
) -> None:
    matcher = a_matcher(real_broker)
    matcher._tools = replace(matcher._tools, images=ImageCheck(tmp_path, None))
    SegmentSink(real_broker).push([make_rollout(record_id="a")])
    matcher.step(0.0)
    assert read_status(real_broker, 1).by_reason("rejected") == {"image_unusable": 1}
