"""The house rules of the code: who imports whom, what may stand in a core, how large things may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Final

import pytest

from tests.source_tree import (
    PACKAGES,
    ROOT,
    SourceFile,
    dotted,
    is_within,
    listed,
    python_files,
    script_names,
)

# adapters and loops; every other module of broker_schemas and of a role is a core
EDGES: Final = {
    "broker_schemas": {
        *(
            "broker",
            "client",
            "connection",
            "evaluation_rounds",
            "event_log",
            "exchange_deadline",
            "group_reader",
            "learner_door",
            "lease",
            "matcher_door",
            "packer_door",
            "payloads",
            "policy",
            "role_loop",
            "trouble_log",
            "rollout_requests",
            "run_identity",
            "script_library",
            "server_group",
            "server_lock",
            "server_sync",
            "status",
            "vllm_http",
            "weight_transfer",
        ),
        "server_slots",
    },
    "producers": {
        *("asked_again", "broken_jobs", "dispatcher", "hf_backend", "jobs", "metrics", "producer"),
        *("vllm_backend", "vllm_client", "vllm_servers"),
    },
    "consumers": {
        *("admission", "evaluator", "fill_warning", "matcher", "metrics"),
        *("step_packer", "streaming_packer"),
    },
    "learner": {
        *("checkpoints", "distributed", "metrics", "milestones", "patient_broker"),
        *("sharding", "stop_request", "training_log"),
        *("checkpoint_contents", "checkpoint_storage", "checkpoint_writing"),
    },
}
NOT_IN_A_CORE: Final = (
    *("redis", "rq", "torch.distributed", "prometheus_client", "configs", "logging", "time", "socket"),
    *("subprocess", "signal", "os.environ", "os.getenv", "datetime.datetime.now", "datetime.now"),
)
# the learner's ranks in one file, what torch runs inside a sharded model in another; a rollout server
# and rank 0, each at its end, in two more
COLLECTIVES: Final = {
    "learner/distributed.py",
    "learner/sharding.py",
    "broker_schemas/rollout_servers/server_group.py",
    "rollstream/assets/vllm/rollstream_vllm_transfer.py",
}
# planning and writing of files, each rank by itself
WITHOUT_COLLECTIVES: Final = "torch.distributed.checkpoint"
# starting ranks is no collective
LAUNCHER: Final = "rollstream/stack/learner_launcher.py"
LAUNCHER_MAY_USE: Final = ("torch.distributed.run", "torch.distributed.elastic")
SEEDED_GENERATORS: Final = {"random.Random", "numpy.random.Generator", "numpy.random.SeedSequence"}
UNPICKLERS: Final = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
# a test that pickles to prove that nobody unpickles
ATTACKS: Final = {"tests/contract/test_rollout_jobs.py"}
NAMELESS: Final = {"utils", "util", "misc", "helpers", "helper", "common", "manager"}
# "pure but for" names what is not pure itself
CALLS_ITSELF_PURE: Final = re.compile(r"\bPure\b(?! but for)")
POSSESSIVE: Final = re.compile(r"[])\w][*+?]\+|\}\+|\(\?>")
METRICS: Final = {"Counter", "Gauge", "Histogram", "Summary", "Info", "Enum"}
METRIC_UNITS: Final = (
    *("total", "seconds", "bytes", "ratio", "tokens", "segments", "packs", "steps", "versions", "rollouts"),
    *("records", "requests", "ranks", "info", "up", "consumers", "version", "jobs", "producers"),
    *("loss", "norm", "rate", "evaluation"),  # things without a unit are named after what they are
)


def cores() -> list[SourceFile]:
    """Return every module of the roles that is no edge, and those elsewhere that call themselves pure."""
    within_roles = [
        file
        for file in python_files(*EDGES)
        if file.path.stem not in EDGES[file.package] and file.path.name != "__init__.py"
    ]
    return within_roles + [
        file
        for file in python_files("rollstream")
        if CALLS_ITSELF_PURE.search(ast.get_docstring(file.tree) or "")
    ]


def runs_alone(code: str) -> None:
    """Run ``code`` in a fresh interpreter; its assertion is ours."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_cores_hold_no_broker_no_clock_no_environment_and_no_logger() -> None:
    offences = listed(
        f"{file.path}:{line} uses {name}"
        for file in cores()
        for line, name in (*file.imports(), *file.attributes())
        for banned in NOT_IN_A_CORE
        if is_within(name, banned)
    )
    assert not offences, (
        f"a core takes values; move this to the edge, or name the module in EDGES:\n{offences}"
    )


def test_cores_draw_only_from_generators_that_are_passed_in() -> None:
    offences = listed(
        f"{file.path}:{call.lineno} calls {name}"
        for file in cores()
        for name, call in file.calls()
        for full in [re.sub(r"^np\.", "numpy.", name)]
        if (is_within(full, "random") or is_within(full, "numpy.random"))
        and full not in SEEDED_GENERATORS
        and not (full == "numpy.random.default_rng" and call.args)
    )
    assert not offences, f"randomness comes from a seeded generator:\n{offences}"


def test_cores_of_consumers_and_learner_load_no_redis() -> None:
    names = [file.module for file in cores() if file.package in ("consumers", "learner")]
    names += [
        "producers.demand",
        "producers.chunking",
        "broker_schemas.records.freshness",
        "broker_schemas.records.schedule",
        "broker_schemas.records.records",
    ]
    runs_alone(f"import {', '.join(names)}, sys; assert 'redis' not in sys.modules")


def test_collectives_live_where_they_are_guarded() -> None:
    offences = listed(
        f"{file.path}:{line} uses {name}"
        for file in python_files(*PACKAGES)
        if str(file.path) not in COLLECTIVES
        for line, name in (*file.imports(), *file.attributes())
        if (is_within(name, "torch.distributed") and not is_within(name, WITHOUT_COLLECTIVES))
        or name.endswith(".DistributedDataParallel")
        if str(file.path) != LAUNCHER or not any(is_within(name, allowed) for allowed in LAUNCHER_MAY_USE)
    )
    assert not offences, f"torch.distributed belongs to {', '.join(sorted(COLLECTIVES))}:\n{offences}"


@pytest.mark.req("Q-1")
def test_matcher_and_packer_start_without_torch_and_transformers() -> None:
    runs_alone(
        "import rollstream.wiring.match, rollstream.wiring.pack, sys; "
        "loaded = {'torch', 'transformers'} & set(sys.modules); assert not loaded, loaded"
    )


def test_broker_schemas_loads_neither_redis_nor_torch() -> None:
    runs_alone(
        "import broker_schemas, sys; "
        "loaded = {'redis', 'torch'} & set(sys.modules); assert not loaded, loaded"
    )


@pytest.mark.req("Q-3")
def test_nothing_is_ever_unpickled() -> None:
    def found() -> Iterator[str]:
        for file in python_files(*PACKAGES, "tests"):
            for line, name in file.imports():
                if name.split(".")[0] in UNPICKLERS and str(file.path) not in ATTACKS:
                    yield f"{file.path}:{line} imports {name}"
            for name, call in file.calls():
                given = {keyword.arg: keyword.value for keyword in call.keywords}
                if name == "torch.load" and not is_true(given.get("weights_only")):
                    yield f"{file.path}:{call.lineno} torch.load without weights_only=True"
                if "allow_pickle" in given and is_true(given["allow_pickle"]):
                    yield f"{file.path}:{call.lineno} allow_pickle=True"

    assert not listed(found()), listed(found())


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


@pytest.mark.req("Q-3", "O-5")
def test_rq_is_always_given_the_json_serializer() -> None:
    calls = [
        (file, name, call)
        for file in python_files(*PACKAGES)
        if any(is_within(name, "rq") for _, name in file.imports())
        for name, call in file.calls()
        if name in ("Queue", "Worker", "SimpleWorker", "cls", "Job.fetch", "Job.create")
    ]
    assert calls, "no RQ queue is opened anywhere: this rule looks in the wrong place"
    offences = listed(
        f"{file.path}:{call.lineno} {name}(…) without serializer=JSONSerializer"
        for file, name, call in calls
        if not any(k.arg == "serializer" and dotted(k.value) == "JSONSerializer" for k in call.keywords)
    )
    assert not offences, f"RQ pickles unless told otherwise:\n{offences}"


def test_no_module_is_over_400_lines() -> None:
    offences = listed(
        f"{file.path}: {len(file.text.splitlines())} lines"
        for file in python_files(*PACKAGES, "tests")
        if len(file.text.splitlines()) > 400
    )
    assert not offences, f"split at 400:\n{offences}"


def test_no_function_is_over_50_lines() -> None:
    offences = listed(
        f"{file.path}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for file in python_files(*PACKAGES, "tests")
        for node in file.nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
        if node.end_lineno - node.lineno + 1 > 50
    )
    assert not offences, f"split at 50:\n{offences}"


def test_files_are_named_after_the_idea_in_them() -> None:
    offences = listed(
        str(file.path)
        for file in python_files(*PACKAGES, "tests")
        for part in file.path.with_suffix("").parts
        if set(part.split("_")) & NAMELESS
    )
    assert not offences, offences


def test_nothing_is_printed_and_nothing_flushes_a_server() -> None:
    offences = listed(
        f"{file.path}:{call.lineno} calls {name}"
        for file in python_files(*PACKAGES)
        for name, call in file.calls()
        if name == "print" or name.split(".")[-1] in ("flushall", "flushdb")
    )
    assert not offences, offences


def test_fields_say_which_version_and_which_step() -> None:
    offences = listed(
        f"{file.path}:{node.lineno} field {node.target.id}"
        for file in python_files(*PACKAGES)
        for owner in file.nodes
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if node.target.id in ("version", "step")
    )
    assert not offences, offences


@pytest.mark.parametrize("name", script_names())
def test_every_script_has_its_legend(name: str) -> None:
    lines = (ROOT / "broker_schemas" / "broker" / "scripts" / f"{name}.lua").read_text("utf-8").splitlines()
    length = next(index for index, line in enumerate(lines) if not line.startswith("--"))
    legend, body = "\n".join(lines[:length]), "\n".join(lines[length:])

    assert legend.startswith("-- "), "the first line says what the transition does"
    assert "Reply:" in legend
    for place in ("KEYS", "ARGV"):
        for number in set(re.findall(rf"{place}\[(\d+)\]", body)):
            assert f"{place}[{number}]" in legend, f"{place}[{number}] is used and not explained"
    assert not re.search(r"flush(all|db)", body, re.IGNORECASE), "nothing ever flushes a server"


@pytest.mark.req("Q-2")
def test_every_script_is_listed_and_called_by_a_door() -> None:
    stored = {path.stem for path in (ROOT / "broker_schemas" / "broker" / "scripts").glob("*.lua")} - {
        "prelude"
    }
    called = {
        argument.value
        for file in python_files(*PACKAGES)
        for name, call in file.calls()
        if name.endswith(".run") or name == "run_script"
        for argument in call.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }
    assert set(script_names()) == stored
    assert stored <= called, f"never called: {sorted(stored - called)}"


def metric_calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Yield (place, kind, call) of every metric that is declared."""
    for file in python_files(*PACKAGES):
        ours = {name for _, name in file.imports() if is_within(name, "prometheus_client")}
        known = {name.split(".")[-1] for name in ours}  # collections has a Counter too
        for name, call in file.calls():
            head, _, last = name.rpartition(".")
            kind = last.removesuffix("MetricFamily")
            if kind in METRICS and (head or last) in known:
                yield f"{file.path}:{call.lineno}", kind, call


@pytest.mark.req("O-3")
def test_metric_names_say_what_and_in_which_unit() -> None:
    def found() -> Iterator[str]:
        for place, kind, call in metric_calls():
            first = call.args[0] if call.args else None
            if not isinstance(first, ast.Constant) or not isinstance(first.value, str):
                yield f"{place} a metric's name is one literal, so that it can be found"
            elif not re.fullmatch(rf"rollstream(_[a-z0-9]+)*_({'|'.join(METRIC_UNITS)})", first.value):
                yield f"{place} {first.value}: expected rollstream_<what>_<unit>, unit of {METRIC_UNITS}"
            elif (kind == "Counter") != first.value.endswith("_total"):
                yield f"{place} {first.value}: counters, and only they, end in _total"

    assert list(metric_calls()), "no metric is declared anywhere: this rule looks in the wrong place"
    assert not listed(found()), listed(found())


def test_metrics_are_declared_on_a_registry_that_is_passed_in() -> None:
    offences = listed(
        f"{place} without registry="
        for place, _, call in metric_calls()
        if not dotted(call.func).endswith("MetricFamily")
        and not any(keyword.arg == "registry" for keyword in call.keywords)
    )
    assert not offences, offences


def test_no_regular_expression_relies_on_what_early_python_3_11_gets_wrong() -> None:
    offences = listed(
        f"{file.path}:{call.lineno} {ast.unparse(argument)[:60]}"
        for file in python_files(*PACKAGES)
        for name, call in file.calls()
        if name.startswith("re.")
        for argument in call.args[:1]
        for literal in ast.walk(argument)
        if isinstance(literal, ast.Constant) and POSSESSIVE.search(str(literal.value))
    )
    assert not offences, f"possessive or atomic groups match wrongly in early Python 3.11:\n{offences}"


def leftovers(docstring: str) -> list[str]:
    """Return second lines of two-line paragraphs that hold a word or two: a re-wrapping left them over."""
    paragraphs = [part.splitlines() for part in docstring.split("\n\n")]
    return [lines[1] for lines in paragraphs if len(lines) == 2 and len(lines[1].split()) <= 2]


def test_no_docstring_ends_a_paragraph_on_a_word_or_two() -> None:
    offences = listed(
        f"{file.path}:{getattr(node, 'lineno', 1)} {line}"
        for file in python_files(*PACKAGES)
        for node in file.nodes
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for line in leftovers(ast.get_docstring(node) or "")
        if not line.lstrip().startswith(("-", "|"))
    )
    assert not offences, f"shorten the sentence, or divide it evenly:\n{offences}"
