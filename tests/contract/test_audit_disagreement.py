"""The audit fails where the archive is damaged, or where anything else that knows of the log disagrees."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.testing

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.learner_door import LearnerDoor
from broker_schemas.errors import BrokerUnavailable
from rollstream.bench.queue_throughput import make_rollouts, push_match_and_pack
from rollstream.commands.program import app
from rollstream.history.archive import ArchiveWriter
from rollstream.history.archive_reading import EVENTS_FILE, PAYLOADS_FILE
from rollstream.history.auditing import audit_run
from rollstream.history.frames import Frame, encode_frame, scan_frames
from rollstream.run_folder import RunFolder
from tests.builders.settings import claim_settings

NUM_STEPS = 6


@pytest.fixture
def run(tmp_path: Path, real_broker: Broker, redis_url: str, run_name: str) -> RunFolder:
    """A run of some steps with its archive, its training log and a checkpoint; its broker is running."""
    folder = RunFolder(tmp_path / run_name)
    learner = LearnerDoor(real_broker, claim_settings(world_size=1, mode="wait", archived_only=True))
    folder.path.mkdir()
    archive = ArchiveWriter(real_broker, folder.archive_dir)
    rows = []
    for step in range(NUM_STEPS):
        rollouts = make_rollouts(random.Random(step), 4, num_tokens=30, prefix=f"s{step}")
        push_match_and_pack(real_broker, rollouts)
        claim = learner.claim_step(optimizer_step=step, scheduled_kind="B", policy_version=0)
        assert claim is not None
        learner.commit_step(optimizer_step=step, summary={"loss": 1.0})
        status = learner.queue_status()
        assert (status.ready_depths, status.matched_waiting) == ((0,), 0)
        rows.append({"optimizer_step": step, "kind": "B", "num_segments": claim.num_segments})
        archive.step(block_ms=1)
    learner.settle_checkpoint(optimizer_step=NUM_STEPS - 2)
    while archive.step(block_ms=1):
        pass
    archive.close()
    (folder.checkpoints_dir / f"checkpoint-{NUM_STEPS - 2}").mkdir(parents=True)
    write_rows(folder, rows)
    folder.broker.write_text(json.dumps({"url": redis_url, "pid": None}))
    return folder


def write_rows(folder: RunFolder, rows: list[dict[str, object]]) -> None:
    folder.train_log.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(folder: RunFolder) -> list[dict[str, object]]:
    return [json.loads(line) for line in folder.train_log.read_text().splitlines()]


def frames_of(path: Path) -> list[bytes]:
    raw = path.read_bytes()
    return [raw[item.start : item.end] for item in scan_frames(path) if isinstance(item, Frame)]


def broker_down(folder: RunFolder) -> None:
    folder.broker.unlink()


@pytest.mark.parametrize("is_down", [False, True])
def test_a_run_that_is_whole_is_balanced(run: RunFolder, is_down: bool) -> None:
    if is_down:
        broker_down(run)

    audit = audit_run(run.path)

    assert audit.faults == []
    assert audit.balanced
    assert audit.trained == 4 * NUM_STEPS


def half_the_frames(path: Path) -> None:
    frames = frames_of(path)
    path.write_bytes(b"".join(frames[: len(frames) // 2]))


def half_the_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_frame_less(path: Path) -> None:
    frames = frames_of(path)
    path.write_bytes(b"".join(frames[:3] + frames[4:]))


def first_frame_less(path: Path) -> None:
    path.write_bytes(b"".join(frames_of(path)[1:]))


def one_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(bytes(raw))


def noise(path: Path) -> None:
    path.write_bytes(random.Random(7).randbytes(path.stat().st_size))


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def gone(path: Path) -> None:
    path.unlink()


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


WRONGS = [
    half_the_frames,
    half_the_bytes,
    one_frame_less,
    first_frame_less,
    one_bit,
    noise,
    nothing,
    gone,
    zeros,
]


@pytest.mark.req("Q-20", "Q-14")
@pytest.mark.parametrize("file", [EVENTS_FILE, PAYLOADS_FILE])
@pytest.mark.parametrize("wrong", WRONGS, ids=lambda wrong: wrong.__name__)
def test_an_archive_that_lacks_or_garbles_anything_fails_the_audit(
    run: RunFolder, wrong: Callable[[Path], None], file: str
) -> None:
    """Given a stack that is down: the training log and the checkpoint alone know better."""
    broker_down(run)
    wrong(run.archive_dir / file)

    done = typer.testing.CliRunner().invoke(app, ["audit", str(run.path)])

    assert done.exit_code == 1, done.output
    assert "NOT balanced" in done.output


@pytest.mark.req("Q-20")
def test_a_frame_that_an_older_writer_repeats_is_read_once(run: RunFolder) -> None:
    path = run.archive_dir / EVENTS_FILE
    frames = frames_of(path)
    path.write_bytes(b"".join(frames + frames[5:9]))

    audit = audit_run(run.path)

    assert (audit.faults, audit.trained) == ([], 4 * NUM_STEPS)


@pytest.mark.req("Q-20")
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("counter", "trained_segments: the log gives 24, the broker counted 23"),
        ("policies", "policies_published: the log gives 0, the broker counted 3"),
        ("claim lost", "claims of optimizer steps 5: in the log, not in the broker"),
        ("claim forged", "claims of optimizer steps 40: in the broker, not in the log"),
        ("row unknown", "optimizer steps 6: in the training log, not committed"),
        ("row kind", "optimizer steps 2: the training log has another kind or number"),
        ("row number", "optimizer steps 3: the training log has another kind or number"),
        ("row missing", "optimizer steps 1: committed, but not in the training log"),
        ("checkpoint", "checkpoint-9: covers optimizer steps 6, 7, 8"),
    ],
)
def test_whatever_else_disagrees_with_the_log_fails_the_audit(
    run: RunFolder, real_broker: Broker, what: str, says: str
) -> None:
    keys, client, rows = real_broker.keys, real_broker.client, read_rows(run)
    if what == "counter":
        client.hincrby(keys.named("counters"), "trained_segments", -1)
    elif what == "policies":
        client.hset(keys.named("counters"), "policies_published", "3")
    elif what == "claim lost":
        client.zrem(keys.named("claims"), "5")
    elif what == "claim forged":
        client.zadd(keys.named("claims"), {"40": 40})
    elif what == "row unknown":
        rows.append({"optimizer_step": 6, "kind": "B", "num_segments": 4})
    elif what == "row kind":
        rows[2]["kind"] = "A"
    elif what == "row number":
        rows[3]["num_segments"] = 3
    elif what == "row missing":
        del rows[1]
    else:
        (run.checkpoints_dir / "checkpoint-9").mkdir()
    write_rows(run, rows)

    audit = audit_run(run.path)

    assert not audit.balanced
    assert any(fault.startswith(says) for fault in audit.faults), audit.faults


ODD_TEXTS = ["[/x]", "[red]", ":smile:", "a\x1b[31mb", "\udcff", "a\nb", "😀", "[/]" * 9]


@pytest.mark.req("Q-20")
@pytest.mark.parametrize("text", ODD_TEXTS)
@pytest.mark.parametrize("option", ["--sample", "--step"])
def test_odd_text_is_shown_and_never_ends_in_a_traceback(run: RunFolder, text: str, option: str) -> None:
    done = typer.testing.CliRunner().invoke(app, ["audit", str(run.path), option, text])

    assert done.exit_code == (0 if option == "--sample" else 2)
    assert "\x1b[31m" not in done.output


@pytest.mark.req("Q-20")
def test_a_frame_that_is_no_event_is_named_with_its_place(run: RunFolder) -> None:
    path = run.archive_dir / EVENTS_FILE
    path.write_bytes(path.read_bytes() + encode_frame({"id": "zero", "type": 3}))

    done = typer.testing.CliRunner().invoke(app, ["audit", str(run.path)])

    assert done.exit_code != 0
    assert "is no event" in f"{done.exception}"


@pytest.mark.req("Q-14", "Q-20")
@pytest.mark.parametrize("why", ["away", "refuses", "not running"])
def test_an_audit_from_the_archive_alone_says_so_and_why(run: RunFolder, redis_url: str, why: str) -> None:
    if why == "not running":
        broker_down(run)
    else:
        where = {"away": "unix:///nowhere.sock", "refuses": redis_url.replace("://", "://nobody:wrong@", 1)}[
            why
        ]
        run.broker.write_text(json.dumps({"url": where, "pid": None}))
    runner = typer.testing.CliRunner()

    shown = runner.invoke(app, ["audit", str(run.path)])
    told = json.loads(runner.invoke(app, ["audit", str(run.path), "--json"]).output)

    assert shown.exit_code == 0
    assert "from the archive alone, the broker was not asked: " in " ".join(shown.output.split())
    assert told["log"] == "archive"
    named = {"away": "connect", "refuses": "password", "not running": "no stack is running"}[why]
    assert named in told["broker_not_asked"], told["broker_not_asked"]


@pytest.mark.req("Q-20")
def test_without_an_archive_a_broker_that_is_away_is_the_reason(run: RunFolder) -> None:
    shutil.rmtree(run.archive_dir)
    run.broker.write_text(json.dumps({"url": "unix:///nowhere.sock", "pid": None}))

    with pytest.raises(BrokerUnavailable, match=r"no broker to ask \(.*nowhere"):
        audit_run(run.path)


@pytest.mark.req("Q-14")
def test_an_audit_with_its_broker_says_that_it_asked(run: RunFolder) -> None:
    told = audit_run(run.path).to_json()

    assert (told["log"], told["broker_not_asked"]) == ("archive and broker", "")


@pytest.mark.req("Q-14")
def test_an_audit_of_a_run_that_moves_compares_one_moment(
    run: RunFolder, real_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given transitions that happen after the sums were read and before the log is."""
    from rollstream.history import auditing

    read = auditing.read_sums

    def read_then_move(broker: Broker) -> object:
        sums = read(broker)
        push_match_and_pack(real_broker, make_rollouts(random.Random(9), 4, num_tokens=30, prefix="later"))
        return sums

    monkeypatch.setattr(auditing, "read_sums", read_then_move)

    assert audit_run(run.path).faults == []
