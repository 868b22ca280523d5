"""Every reason that a script or a role writes is one that metrics and pages know."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from broker_schemas import errors
from broker_schemas.broker.script_library import script_source
from broker_schemas.records.reasons import DROP_REASONS, REJECTION_REASONS, SKIP_REASONS
from tests.source_tree import python_files, script_names

WRITTEN_BY_SCRIPTS = {
    "dropped": (r"drop_segments\(.*, '(\w+)', '\w+'\)", r"= 'dropped', '(\w+)'"),
    "rejected": (r"fail_request\(id, '(\w+)'", r"reject\(\w+, \w+, '(\w+)'"),
    "skipped": (r"decide\('A', '(?!schedule')(\w+)'",),
}
KNOWN = {"dropped": set(DROP_REASONS), "rejected": set(REJECTION_REASONS), "skipped": set(SKIP_REASONS)}
GIVEN_AS = {"drop": "dropped", "fail_request": "rejected", "Rejection": "rejected"}


def written_by_scripts(kind: str) -> set[str]:
    return {
        reason
        for name in script_names()
        for pattern in WRITTEN_BY_SCRIPTS[kind]
        for reason in re.findall(pattern, script_source(name))
    }


def written_by_roles() -> Iterator[tuple[str, str, str]]:
    """Yield (place, kind, reason) of every literal that a role gives as a reason."""
    for file in python_files("broker_schemas", "consumers", "producers", "learner"):
        for name, call in file.calls():
            kind = GIVEN_AS.get(name.split(".")[-1])
            for keyword in call.keywords if kind else ():
                if keyword.arg == "reason" and isinstance(keyword.value, ast.Constant):
                    yield f"{file.path}:{call.lineno}", str(kind), str(keyword.value.value)


@pytest.mark.req("O-3", "Q-17")
@pytest.mark.parametrize("kind", sorted(KNOWN))
def test_what_a_script_writes_as_a_reason_is_known(kind: str) -> None:
    written = written_by_scripts(kind)
    assert written, "no reason was found in any script: this rule looks in the wrong place"
    assert written <= KNOWN[kind]


@pytest.mark.req("O-3", "Q-17")
def test_what_a_role_writes_as_a_reason_is_known() -> None:
    found = list(written_by_roles())
    assert {kind for _, kind, _ in found} == {"dropped", "rejected"}
    assert [item for item in found if item[2] not in KNOWN[item[1]]] == []


def test_every_error_that_rejects_a_record_has_a_known_reason() -> None:
    def below(kind: type[errors.RecordError]) -> Iterator[type[errors.RecordError]]:
        yield kind
        for other in kind.__subclasses__():
            yield from below(other)

    assert {kind.reason for kind in below(errors.RecordError)} <= set(REJECTION_REASONS)
