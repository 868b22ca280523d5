"""Reading configuration files: values, line numbers, extends, overrides, and faults of the file itself."""

from __future__ import annotations

import tempfile
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from configs import ConfigError, load_config
from configs.loader import read_config
from configs.source_lines import ConfigYamlDumper, parse_yaml
from tests.builders.configs import load_mapping, make_mapping, put, refusal, write_file

VALID_TEXT = """\
run: {name: test}
data: {train_jsonl: train.jsonl}
model: {name_or_path: some/folder}
custom:
  trainer_variant: stage2_ab_training
stage2_ab:
  schedule:
    b_ratio: 0.29
training:
  effective_batch_size: 8
  per_device_train_batch_size: 2
  global_max_length: 2000
  max_steps: 10
  learning_rate: 1e-3
devices:
  learner_world_size: 2
"""


def test_a_valid_file_loads_with_defaults_and_derived_numbers(tmp_path: Path) -> None:
    config = load_config(write_file(tmp_path, VALID_TEXT))

    assert config.training.learning_rate == 0.001
    assert config.training.packing_buffer == 512
    assert config.training.packing_min_fill_ratio == 0.65
    assert config.stage2_async.version_window == 2
    assert config.gradient_accumulation_steps == 2
    assert config.rollouts_per_rank_per_step == 4


def test_a_loaded_configuration_is_frozen(tmp_path: Path) -> None:
    config = load_config(write_file(tmp_path, VALID_TEXT))

    with pytest.raises(ValidationError, match="frozen"):
        config.training.max_steps = 3


@pytest.mark.req("S-1")
@pytest.mark.parametrize(
    "text",
    ["0.29", "0.7", "0.100000000000000055", '"0.3"', "0", "1", "1.0", "2.5e-1", "0.000000000000000001"],
)
def test_the_b_ratio_is_the_decimal_that_was_written(tmp_path: Path, text: str) -> None:
    from_file = load_config(write_file(tmp_path, VALID_TEXT.replace("0.29", text)))
    from_override = load_config(write_file(tmp_path, VALID_TEXT), [f"stage2_ab.schedule.b_ratio={text}"])

    assert from_file.stage2_ab.schedule.b_ratio == Decimal(text.strip('"'))
    assert from_override.b_ratio == from_file.b_ratio == Fraction(text.strip('"'))


@pytest.mark.req("S-1")
@pytest.mark.parametrize(
    "text", ["1.01", "-0.1", "half", ".nan", ".inf", "true", "[0.5]", "1e-30", "'1e-999999999'", "null"]
)
def test_a_b_ratio_outside_zero_to_one_or_no_decimal_is_refused(tmp_path: Path, text: str) -> None:
    message = refusal(tmp_path, VALID_TEXT.replace("0.29", text))

    assert f"{tmp_path}/config.yaml:8: stage2_ab.schedule.b_ratio: " in message


def test_every_rollout_variant_has_the_b_ratio_one(tmp_path: Path) -> None:
    assert load_mapping(tmp_path, make_mapping("rollout_matching_sft")).b_ratio == 1


@pytest.mark.req("S-6")
def test_all_problems_come_in_one_report_with_their_lines(tmp_path: Path) -> None:
    text = VALID_TEXT.replace("max_steps: 10", "max_step: 10").replace("2000", "many")
    text = text.replace("effective_batch_size: 8", "effective_batch_size: 0")
    text += "learning_rate: 3\nbroker: {durability: sometimes}\n"

    report = refusal(tmp_path, text)

    file = tmp_path / "config.yaml"
    assert report.splitlines()[0] == f"{file}: 6 problems"
    assert f"{file}:9: training.max_steps: is required" in report
    assert f"{file}:10: training.effective_batch_size: got 0, expected greater than or equal to 1" in report
    assert f"{file}:12: training.global_max_length: got 'many', expected a valid integer" in report
    assert f"{file}:13: training.max_step: unknown key; did you mean training.max_steps?" in report
    assert f"{file}:17: learning_rate: unknown key; did you mean training.learning_rate?" in report
    assert f"{file}:18: broker.durability: " in report


def test_problems_between_sections_are_told_beside_faulty_values(tmp_path: Path) -> None:
    mapping = make_mapping(training__max_steps="ten", devices__rollout_gpus=[1], devices__learner_gpus=[1, 2])

    report = refusal(tmp_path, mapping)

    assert "training.max_steps: got 'ten'" in report
    assert "devices.rollout_gpus: GPU 1 is also in learner_gpus" in report
    assert "2 problems" in report


def test_a_problem_that_rests_on_a_faulty_value_is_not_told(tmp_path: Path) -> None:
    report = refusal(tmp_path, make_mapping(training__effective_batch_size="x", stage2_async__queue_limit=1))

    assert "training.effective_batch_size: got 'x'" in report
    assert "prefetch_target_packs: got 4, above queue_limit 1" in report
    assert "2 problems" in report


@pytest.mark.req("S-6")
@pytest.mark.parametrize(
    "key, advice",
    [
        ("training.max_stepz", "did you mean training.max_steps?"),
        ("stage2_ab.queue_limit", "did you mean stage2_async.queue_limit?"),
        ("base_url", "did you mean custom.extra.rollout_matching.vllm.server.servers.base_url?"),
        ("archive.zzz", "known here: enabled"),
        ("training.zzz", "docs/CONFIG.md lists every key"),
        ("custom.extra.rollout_matching.decoding.temprature", "decoding.temperature?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_name_it_may_have_meant(
    tmp_path: Path, key: str, advice: str
) -> None:
    mapping = make_mapping()
    put(mapping, key, 1)

    report = refusal(tmp_path, mapping)

    assert f"config.yaml:{line_of(tmp_path, key.split('.')[-1])}: {key}: unknown key; " in report
    assert advice in report
    assert "1 problem\n" in report


def line_of(folder: Path, word: str) -> int:
    lines = (folder / "config.yaml").read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, start=1) if word in line)


@pytest.mark.parametrize(
    "section, value", [("training", 5), ("data", [1]), ("custom", "x"), ("broker", True), ("model", None)]
)
def test_a_section_that_is_no_mapping_is_refused(tmp_path: Path, section: str, value: object) -> None:
    mapping = make_mapping()
    mapping[section] = value

    report = refusal(tmp_path, mapping)

    assert f": {section}" in report


def test_an_empty_file_lists_every_required_key(tmp_path: Path) -> None:
    report = refusal(tmp_path, "")

    for key in ("run.name", "data.train_jsonl", "custom.trainer_variant", "training.max_steps"):
        assert f"{key}: is required" in report
    assert "got neither of name_or_path and config" in report


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a: [1", "is not valid YAML"),
        ("- a\n- b\n", "the top level must be a mapping"),
        ("just words", "the top level must be a mapping"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("a: *nowhere", "is not valid YAML"),
        ("a: &x {b: *x}", "is an alias inside itself?"),
        ("[" * 5000, "is not valid YAML"),
        ("run: !!python/object:os.system {}", "unknown key|required"),
        ("run: {name: !secret x}", "the tag !secret is not supported"),
        ("run: {? [a] : b}", "a key must be a plain word"),
        ("run: {name: \0}", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_plain_mapping_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    report = refusal(tmp_path, text)

    assert any(choice in report for choice in expected.split("|"))


def test_a_key_written_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    report = refusal(tmp_path, VALID_TEXT.replace("  max_steps: 10", "  max_steps: 10\n  max_steps: 20"))

    assert "config.yaml:14: training.max_steps: written twice, first on line 13; keep one" in report


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    not_text = tmp_path / "latin.yaml"
    not_text.write_bytes(b"run: {name: \xff}")

    for path, expected in (
        (tmp_path / "missing.yaml", "no such file"),
        (tmp_path, "is a folder"),
        (not_text, "is not UTF-8"),
    ):
        with pytest.raises(ConfigError, match=expected):
            load_config(path)


def test_an_alias_bomb_is_refused_quickly(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]

    assert "values; is an alias inside itself?" in refusal(tmp_path, "\n".join(lines))


@pytest.mark.req("S-6")
@pytest.mark.parametrize("text", ["xs: [" + "1," * 2_000_000 + "1]", "xs:\n" + "- 1\n" * 2_000_000])
def test_a_huge_list_is_refused_before_it_is_parsed(tmp_path: Path, text: str) -> None:
    """Given millions of items: the time is that of reading the file, with room for a busy machine."""
    started = time.process_time()

    refusal(tmp_path, text)

    assert time.process_time() - started < 1


@pytest.mark.req("S-6")
def test_a_list_within_the_files_limit_is_refused_at_its_first_thousands(tmp_path: Path) -> None:
    started = time.process_time()

    assert "more than 2000 values" in refusal(tmp_path, "xs: [" + "1," * 400_000 + "1]")
    assert time.process_time() - started < 3


def test_scalars_follow_yaml_1_2() -> None:
    tree = parse_yaml("a: 1e-3\nb: on\nc: '1'\nd: ~\ne: 1_0\nf: -.inf\ng: 012\nh: 1:30\ni: True", "f")

    assert tree.mapping == {
        "a": 0.001,
        "b": "on",
        "c": "1",
        "d": None,
        "e": "1_0",
        "f": float("-inf"),
        "g": 12,
        "h": "1:30",
        "i": True,
    }


def test_a_number_of_too_many_digits_stays_text() -> None:
    assert parse_yaml("a: " + "9" * 5000, "f").mapping == {"a": "9" * 5000}


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=3))
def test_what_the_dumper_writes_is_read_back(mapping: dict[str, object]) -> None:
    text = yaml.dump(mapping, Dumper=ConfigYamlDumper, allow_unicode=True)

    assert parse_yaml(text, "f").mapping == mapping


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab:{}[]-&*!<>|'\"#,? \n\t%0.1", max_size=40))
def test_any_text_is_refused_with_a_reason_and_never_breaks_the_reader(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config, problems = read_config(write_file(Path(folder), text))

    assert config is None
    assert problems


def test_extends_joins_mappings_and_keeps_each_line(tmp_path: Path) -> None:
    write_file(tmp_path, VALID_TEXT, "base.yaml")
    (tmp_path / "inner").mkdir()
    write_file(tmp_path / "inner", "extends: ../base.yaml\ntraining:\n  max_steps: 3\n", "middle.yaml")
    top = write_file(tmp_path / "inner", "extends: middle.yaml\nrun: {name: top}\n", "top.yaml")

    config = load_config(top)

    assert (config.run.name, config.training.max_steps, config.training.effective_batch_size) == ("top", 3, 8)
    assert str(config.sources["run", "name"]) == f"{top}:2"
    assert str(config.sources["training", "max_steps"]).endswith("middle.yaml:3")
    assert str(config.sources["training", "effective_batch_size"]).endswith("base.yaml:10")


def test_a_problem_in_an_extended_file_names_that_file(tmp_path: Path) -> None:
    write_file(tmp_path, VALID_TEXT.replace("max_steps: 10", "max_steps: 0"), "base.yaml")

    report = refusal(tmp_path, "extends: base.yaml\n")

    assert "base.yaml:13: training.max_steps: got 0" in report


def test_a_section_without_a_value_takes_out_what_is_extended(tmp_path: Path) -> None:
    write_file(tmp_path, make_mapping(stage2_async__queue_limit=9), "base.yaml")
    text = "extends: base.yaml\ncustom: {trainer_variant: rollout_matching_sft}\n"

    assert "stage2_async.queue_limit: would be ignored" in refusal(tmp_path, text)
    config = load_config(write_file(tmp_path, text + "stage2_async:\nstage2_ab:\n"))

    assert config.stage2_async.queue_limit == 8


@pytest.mark.parametrize(
    "text, expected",
    [
        ("extends: config.yaml\n", "in a circle: config.yaml -> config.yaml"),
        ("extends: loop.yaml\n", "in a circle: config.yaml -> loop.yaml -> config.yaml"),
        ("extends: missing.yaml\n", "missing.yaml: no such file"),
        ("extends: [a.yaml]\n", "expected the name of one YAML file"),
        ("extends:\n", "expected the name of one YAML file"),
    ],
)
def test_an_extends_that_leads_nowhere_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    write_file(tmp_path, "extends: config.yaml\n", "loop.yaml")

    assert expected in refusal(tmp_path, text)


def test_overrides_win_in_order_and_are_named_as_the_source(tmp_path: Path) -> None:
    path = write_file(tmp_path, VALID_TEXT)
    overrides = [
        "training.max_steps=5",
        "training.max_steps=6",
        "training={warmup_steps: 2}",
        "devices.rollout_gpus=[3, 4]",
        "data.val_jsonl=",
    ]

    config = load_config(path, overrides)

    assert (config.training.max_steps, config.training.warmup_steps) == (6, 2)
    assert config.devices.rollout_gpus == (3, 4)
    assert config.data.val_jsonl is None
    assert str(config.sources["training", "max_steps"]) == "override training.max_steps"
    assert str(config.sources["training", "effective_batch_size"]) == f"{path}:10"


@pytest.mark.parametrize(
    "override, expected",
    [
        ("training.max_steps", "is not an override; write section.key=value"),
        ("=3", "is not an override"),
        ("training..x=3", "is not an override"),
        ("training.max_steps=[1", "override training.max_steps: is not valid YAML"),
        ("training.max_steps=0", "override training.max_steps: training.max_steps: got 0"),
        ("training.max_steps.x=0", "override training.max_steps.x: training.max_steps: got"),
        ("training.max_stepz=1", "training.max_stepz: unknown key; did you mean training.max_steps?"),
    ],
)
def test_a_wrong_override_is_refused_and_named(tmp_path: Path, override: str, expected: str) -> None:
    report = refusal(tmp_path, VALID_TEXT, override)

    assert expected in report
    assert "1 problem\n" in report


def test_paths_stay_as_written(tmp_path: Path) -> None:
    config = load_mapping(tmp_path, make_mapping(data__train_jsonl="a/../b.jsonl", run__output_dir="out"))

    assert (config.data.train_jsonl, config.run.output_dir) == ("a/../b.jsonl", "out")
    assert config.model.name_or_path == "some/folder"
