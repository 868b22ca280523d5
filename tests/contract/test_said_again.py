"""Each transition said twice, as after a lost reply: no state changes a second time, and the answer is
the first one, or says that nothing was left to do [Q-4].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.keys import MATCHER_GROUP, PACKER_GROUP
from broker_schemas.broker.script_library import Argument
from broker_schemas.client import segment_line
from tests.builders.records import a_rollout, a_segment
from tests.contract.test_transitions import a_learner, match_all, push, ready_packs
from tests.source_tree import script_names

Call = tuple[str, Sequence[str], Sequence[Argument], Sequence[tuple[str, bytes]]]
LONG: Final = 600_000
TAKING: Final = ["claims", "claim:0", "sealed"]


def entry_of(broker: Broker, stream: str, group: str) -> str:
    (found,) = broker.client.xreadgroup(group, "c", {broker.keys.named(stream): ">"}, count=1)  # type: ignore[misc,union-attr]
    return str(found[1][0][0].decode())


def request(broker: Broker) -> None:
    broker.run(*calls(broker)["issue_requests"][:3])


def commit_match(broker: Broker) -> Call:
    push(broker, "a")
    line = f"{entry_of(broker, 'segments', MATCHER_GROUP)}\ta\tmatched\t0\t9\t-1\t20"
    streams = ["segments", "matched", "rejected", "evaluations"]
    body = [(broker.keys.made("a"), a_segment("a").encode_body())]
    return "commit_match", streams, [MATCHER_GROUP, 0, 1, line, ""], body


def pending_descriptor(broker: Broker) -> str:
    push(broker, "a")
    match_all(broker)
    return entry_of(broker, "matched", PACKER_GROUP)


def claimed(broker: Broker) -> None:
    ready_packs(broker, "a", "b", ranks=(0, 1))
    a_learner(broker).claim_step(optimizer_step=0, scheduled_kind="B", policy_version=0)


def calls(broker: Broker) -> dict[str, Any]:
    line, body = segment_line(a_rollout("n")), a_rollout("n").encode_body()
    return {
        "adopt_identity": ("adopt_identity", ["identity"], ["id", "{}", "{}", "me", 0, ""], ()),
        "advance_archive": ("advance_archive", ["archive"], ["1-1", 9, "0-0"], ()),
        "bring_segments": ("bring_segments", [], [120, 1, "a", b"x"], ()),
        "hold_lease": ("hold_lease", ["lease:packer"], [0, "{}", LONG, "packer", 0, "this call"], ()),
        "issue_requests": (
            "issue_requests",
            ["requests", "dispatch"],
            [LONG, 0, 1, "this call", 1, "r", "{}", 1, "r.0", "train", -1, 0],
            (),
        ),
        "open_step": ("open_step", ["open_step", "matched"], [0, 0, 8], ()),
        "publish_policy": ("publish_policy", ["policy"], [1, 1, "w", ""], ()),
        "push_segments": (
            "push_segments",
            ["segments", "seen:now", "seen:before"],
            [1 << 30, 9, 1 << 20, 1, line],
            [(broker.keys.raw("n"), body)],
        ),
        "reap_consumers": ("reap_consumers", ["segments"], [MATCHER_GROUP, "c", LONG], ()),
        "settle_evaluation": (
            "settle_evaluation",
            ["evaluations", "evaluation", "evaluation_numbers"],
            [1, 1, b"\x80", 1, 1, "1-1"],
            (),
        ),
        "take_slots": ("take_slots", ["server_slots:u"], ["holder", 4, 4, LONG], ()),
    }


def prepared(name: str) -> Callable[[Broker], Any]:
    return lambda broker: calls(broker)[name]


def after(prepare: Callable[[Broker], object], *call: Any) -> Callable[[Broker], Any]:
    def build(broker: Broker) -> Any:
        prepare(broker)
        return (*call, ())

    return build


def over_request(broker: Broker) -> Any:
    request(broker)
    broker.run("renew_request", ["requests"], ["r", -1, 1])
    return "reissue_requests", ["requests"], [LONG, 5, 9], ()


def commit_pack(broker: Broker) -> Any:
    entry = pending_descriptor(broker)
    arguments = [PACKER_GROUP, 0, 8, -1, 1, 0, b"body", 0, "p", 1, entry, "a"]
    return "commit_pack", ["matched", "sealed", "open_step"], arguments, ()


def drop_matched(broker: Broker) -> Any:
    entry = pending_descriptor(broker)
    return "drop_matched", ["matched"], [PACKER_GROUP, "stale", 1, entry, "a"], ()


# how to come to a call, and its second answer where that is not the first one: nothing was left to do
TABLE: Final[dict[str, tuple[Callable[[Broker], Any], Any]]] = {
    **{
        name: (prepared(name), "same")
        for name in (
            *("adopt_identity", "advance_archive", "bring_segments", "hold_lease", "issue_requests"),
            *("reap_consumers", "take_slots"),
        )
    },
    "open_step": (prepared("open_step"), 0),
    "publish_policy": (prepared("publish_policy"), 0),
    "settle_evaluation": (prepared("settle_evaluation"), 0),
    "push_segments": (prepared("push_segments"), b"duplicate"),
    "commit_match": (commit_match, b"gone"),
    "commit_pack": (commit_pack, [0, b"a"]),
    "drop_matched": (drop_matched, 0),
    "fail_request": (after(request, "fail_request", ["requests"], ["r", "abandoned", "x"]), 0),
    "renew_request": (after(request, "renew_request", ["requests"], ["r", LONG, 1]), "same"),
    "reissue_requests": (over_request, [0]),
    "claim_step": (
        after(
            lambda broker: ready_packs(broker, "a", "b", ranks=(0, 1)),
            *("claim_step", TAKING, [0, "B", 2, 1, 0, 0, "wait", -1]),
        ),
        "same",
    ),
    "commit_step": (after(claimed, "commit_step", ["claim:0"], [0, b"\x80"]), 0),
    "quarantine": (
        after(claimed, "quarantine", ["claim:0", "rejected"], [0, 1, "a", "quarantined_loss", "x"]),
        "same",
    ),
    "settle_checkpoint": (after(claimed, "settle_checkpoint", ["claims", "archive"], [1, 0, 9]), [0, 0]),
}
# what counts calls, and what is a time
COUNTED_EACH_TIME: Final = {b"duplicates"}
TIMES: Final = {b"until_ms"}


def state_of(broker: Broker) -> dict[bytes, Any]:
    """Return all that the run holds, but for what counts calls or is a time."""
    client: Any = broker.client
    found: dict[bytes, Any] = {}
    for key in client.scan_iter(broker.keys.prefix + "*"):
        kind = client.type(key)
        if kind == b"hash":
            skipped = COUNTED_EACH_TIME | TIMES
            found[key] = {name: value for name, value in client.hgetall(key).items() if name not in skipped}
        elif kind == b"stream":
            found[key] = client.xrange(key)
        elif kind == b"zset":
            found[key] = client.zrange(key, 0, -1)
        else:
            found[key] = client.smembers(key) if kind == b"set" else client.get(key)
    return found


@pytest.mark.req("Q-2", "Q-4")
@pytest.mark.parametrize("name", list(TABLE))
def test_a_transition_said_again_changes_nothing_and_answers_as_before(broker: Broker, name: str) -> None:
    prepare, second_answer = TABLE[name]
    script, keys, arguments, bodies = prepare(broker)
    first = broker.run(script, keys, arguments, bodies=bodies)
    before = state_of(broker)
    second = broker.run(script, keys, arguments, bodies=bodies)
    assert second == (first if second_answer == "same" else second_answer)
    assert state_of(broker) == before


def test_every_transition_is_said_again() -> None:
    assert set(TABLE) == set(script_names())


@pytest.mark.req("Q-4", "O-5")
def test_a_request_whose_reply_was_lost_is_looked_for_within_15_seconds(broker: Broker) -> None:
    script, keys, arguments, _ = over_request(broker)
    broker.run(script, keys, arguments)
    (due,) = broker.client.zrange(broker.keys.named("requests"), 0, -1, withscores=True)  # type: ignore[misc]
    seconds, _ = broker.client.time()  # type: ignore[misc]
    assert due[1] / 1000 - seconds < 15
