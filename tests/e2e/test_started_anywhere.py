"""Started anywhere: another project's packages change nothing, and the library doors load only when asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rollstream.models.shipped import SHIPPED_MODEL
from rollstream.stack.plan import LaunchSettings, RoleName, role_command, role_environment
from tests.builders.configs import make_mapping, write_file

MAIN = "from rollstream.commands.program import main; main({!r})"


def python(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=role_environment(1) | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of somebody else, whose packages have our names."""
    for name in ("configs", "producers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('their {name}')")
    for name in ("learner", "consumers", "logging", "random"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('their {name}')")
    write_file(tmp_path, make_mapping(model__name_or_path=str(SHIPPED_MODEL)), "run.yaml")
    return tmp_path


@pytest.mark.req("U-3")
def test_the_program_takes_its_own_packages_although_others_come_first_on_the_path(project: Path) -> None:
    done = python(
        project,
        "-P",
        "-c",
        MAIN.format(["config", "check", "run.yaml"]),
        PYTHONPATH=str(project / "elsewhere"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    (project / "logging.py").unlink()
    (project / "random.py").unlink()

    hidden = python(
        project,
        "-c",
        MAIN.format(["config", "check", "run.yaml"]),
        PYTHONSAFEPATH="",
        PYTHONPATH=str(project),
    )

    assert (hidden.returncode, hidden.stderr) == (0, "")
    assert "run.yaml: ok" in hidden.stdout


@pytest.mark.req("U-3")
@pytest.mark.parametrize("role", ["dispatcher", "producer", "matcher", "packer", "archive"])
def test_a_role_of_the_stack_takes_its_own_packages(project: Path, role: str) -> None:
    settings = LaunchSettings(config_path=project / "run.yaml", overrides=(), learner_world_size=1)

    done = python(project, *role_command(RoleName(role=role), settings)[1:])

    # it gets as far as its own configuration's missing broker
    assert (done.returncode, "broker.url: not set" in done.stderr) == (2, True), done.stderr


@pytest.mark.req("U-3")
def test_a_library_door_that_is_hidden_says_so_in_one_line_with_both_paths(project: Path) -> None:
    (project / "logging.py").unlink()
    (project / "random.py").unlink()
    code = "import sys; sys.path.insert(0, '.'); import rollstream; rollstream.load_config"

    done = python(project, "-c", code)

    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: rollstream needs its package 'configs' at ")
    assert f"{Path('configs') / '__init__.py'} comes first on the path" in last


@pytest.mark.req("U-3")
def test_the_library_doors_are_there_and_nothing_is_imported_before_one_is_used(tmp_path: Path) -> None:
    code = """
import sys
before = set(sys.modules)
import rollstream
loaded = {name.split('.')[0] for name in set(sys.modules) - before}
assert loaded == {'rollstream'} | loaded & set(sys.stdlib_module_names), loaded
doors = ('SegmentSink', 'PackFeed', 'PackDataset', 'load_config', 'evaluate', 'import_dataset')
assert set(doors) <= set(dir(rollstream))
rollstream.load_config, rollstream.import_dataset, rollstream.SegmentSink
assert not {'torch', 'transformers'} & set(sys.modules)
assert all(callable(getattr(rollstream, name)) for name in doors)
from rollstream import load_config, PackDataset
"""
    done = python(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
