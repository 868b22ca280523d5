"""A model on a hub: one commit with all of its files, and one line for what a hub refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from broker_schemas.errors import ConfigError, DataError
from rollstream.commands.program import app
from rollstream.models.pushing import push_model
from rollstream.models.shipped import SHIPPED_MODEL
from tests.builders.hub_fake import FakeHub, fake_hub


def use(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    make = HfApi.__init__

    def with_endpoint(self: HfApi, **told: Any) -> None:
        make(self, **({"endpoint": hub.url, "token": "hf_told"} | told))

    monkeypatch.setattr(HfApi, "__init__", with_endpoint)


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # the hub's client and its HTTP library
@pytest.mark.req("L-6")
def test_a_model_is_pushed_whole_in_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(SHIPPED_MODEL, tmp_path / "model"))
    with fake_hub() as hub:
        use(hub, monkeypatch)
        done = CliRunner().invoke(app, ["model", "push", str(folder), "tester/mine"])
    assert done.exit_code == 0, done.output
    assert "tester/mine" in done.output
    assert hub.private == {"tester/mine": True}
    (commit,) = hub.commits
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(commit) == (names | {"README.md"}) - {"made_by_rollstream.json"}
    for name in names - {"made_by_rollstream.json"}:
        assert commit[name] == (folder / name).read_bytes()
    assert b"library_name: transformers" in commit["README.md"]


@pytest.mark.parametrize(
    "status, said", [(401, "hf auth login"), (403, "a token that may write"), (500, "say it again")]
)
def test_what_a_hub_refuses_is_one_line(status: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub() as hub:
        use(hub, monkeypatch)
        hub.refusal = status
        with pytest.raises(ConfigError, match=said) as refused:
            push_model(SHIPPED_MODEL, "tester/mine")
    assert "\n" not in str(refused.value)


def test_a_hub_that_is_not_there_and_a_name_that_cannot_be_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(FakeHub(url="http://127.0.0.1:9"), monkeypatch)
    with pytest.raises(ConfigError, match="check the network"):
        push_model(SHIPPED_MODEL, "tester/mine")
    with pytest.raises(ConfigError, match="owner/model"):
        push_model(SHIPPED_MODEL, "a/b/c d")


def test_a_checkpoint_with_its_optimizer_is_not_pushed(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(DataError, match="rollstream model export"):
        push_model(tmp_path, "tester/mine")
