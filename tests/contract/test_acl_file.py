"""The ACL file as text: every command of a role's scripts is granted, no password stands in it."""

from __future__ import annotations

import hashlib
import re
from typing import Final

import pytest
import typer
from typer.testing import CliRunner

from broker_schemas.broker.script_library import script_source
from broker_schemas.errors import ConfigError
from rollstream.acl import GRANTS, ROLES, Role, acl_file, acl_rules
from rollstream.commands.security import register
from tests.builders.configs import PROJECT_ROOT
from tests.source_tree import script_names

RUN: Final = "guarded"
SCRIPTS: Final[dict[Role, tuple[str, ...]]] = {
    "dispatcher": ("issue_requests", "reissue_requests", "fail_request", "hold_lease"),
    "producer": ("push_segments", "take_slots", "renew_request"),
    "matcher": ("commit_match", "bring_segments", "reap_consumers"),
    "packer": ("commit_pack", "drop_matched", "reap_consumers", "hold_lease"),
    "learner": (
        *("open_step", "claim_step", "commit_step", "quarantine", "settle_checkpoint", "publish_policy"),
        *("adopt_identity", "hold_lease"),
    ),
    "evaluator": ("settle_evaluation", "hold_lease"),
    "archive": ("advance_archive", "hold_lease"),
}
OF_PRELUDE: Final = {
    "emit(": {"xadd", "hincrby"},
    "trim_log(": {"hmget", "hincrby", "xlen", "xrange", "xtrim"},
    "bound_unkept_log(": {"exists", "hmget", "hincrby", "xlen", "xrange", "xtrim"},
    "go_on_at_the_limit(": {"hdel"},
    "count(": {"hincrby"},
    "free_payloads(": {"strlen", "unlink", "hincrby", "hmget"},
    "drop_segments(": {"strlen", "unlink", "hincrby", "hmget", "xadd"},
    "now_ms(": {"time"},
    "close_request(": {"del", "zrem"},
    "fail_request(": {"hget", "del", "zrem", "xadd", "hincrby"},
}


@pytest.mark.parametrize("role", list(SCRIPTS))
def test_every_command_of_a_roles_scripts_is_granted(role: Role) -> None:
    granted = {name for grant in GRANTS[role] for name in grant.commands.split()}
    prelude_length = len(script_source("prelude")) // 2  # it stands before itself there
    for script in SCRIPTS[role]:
        own = script_source(script)[prelude_length:]
        wanted = {name.lower() for name in re.findall(r"redis\.call\('([A-Z]+)'", own)}
        # of a container command its subcommand is granted
        for name, part in re.findall(r"redis\.call\('(XINFO|XGROUP)', '([A-Z]+)'", own):
            wanted = (wanted - {name.lower()}) | {f"{name}|{part}".lower()}
        for helper, commands in OF_PRELUDE.items():
            wanted |= commands if helper in own else set()
        assert wanted <= granted, f"{script}: {sorted(wanted - granted)}"


def test_every_script_belongs_to_a_role() -> None:
    assert {script for scripts in SCRIPTS.values() for script in scripts} == set(script_names())


def test_a_role_without_a_password_is_off_and_no_password_stands_in_the_file() -> None:
    assert " off " in acl_rules(RUN, "matcher")
    hashes: dict[Role, str] = {"matcher": hashlib.sha256(b"hunter2").hexdigest()}
    text = acl_file(RUN, hashes)
    assert text.startswith("user default reset off\n")
    assert "hunter2" not in text
    assert [" on #" in line for line in text.splitlines()].count(True) == 1
    with pytest.raises(ConfigError, match="run name"):
        acl_file("no such run!", {})
    with pytest.raises(ConfigError, match="got passwords of"):
        acl_file(RUN, {"boss": "x"})  # type: ignore[dict-item]


def test_the_example_in_the_documents_is_what_the_command_prints() -> None:
    example = PROJECT_ROOT / "docs" / "redis" / "users.acl.example"
    assert example.read_text(encoding="utf-8") == acl_file("demo", {})


def test_the_command_prints_the_file_and_says_who_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for role in ROLES:
        monkeypatch.delenv(f"ROLLSTREAM_PASSWORD_{role.upper()}", raising=False)
    monkeypatch.setenv("ROLLSTREAM_PASSWORD_LEARNER", "hunter2")
    app = typer.Typer()
    register(app)

    done = CliRunner().invoke(app, ["runs/guarded"])

    hashes: dict[Role, str] = {"learner": hashlib.sha256(b"hunter2").hexdigest()}
    assert done.stdout == acl_file("guarded", hashes)
    assert "user of the matcher is off: ROLLSTREAM_PASSWORD_MATCHER is not set" in done.stderr
    assert "hunter2" not in done.output
