"""L-7: an adapter goes on its base in producers, evaluations and predictions; the base is loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from broker_schemas.broker.policy import PublishedPolicy
from broker_schemas.errors import DataError
from broker_schemas.method.model_folder import load_policy
from producers import hf_backend
from producers.hf_backend import HfBackend
from rollstream.models.shipped import SHIPPED_MODEL
from tests.builders.settings import decoding_settings, hf_backend_settings
from tests.builders.trained_adapters import logits_of, write_trained

torch.set_num_threads(1)


@pytest.mark.req("L-7")
def test_a_producer_puts_each_adapter_on_the_base_that_it_loaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [write_trained(tmp_path / f"v{number}", SHIPPED_MODEL, seed=number) for number in range(2)]
    loads: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        loads.append(args)
        return load_policy(*args, **kwargs)

    monkeypatch.setattr(hf_backend, "load_policy", counted)
    settings = hf_backend_settings(decoding=decoding_settings(max_new_tokens=4), base=SHIPPED_MODEL)
    backend = HfBackend(None, None, settings)  # type: ignore[arg-type]
    for number, expected in enumerate(models):
        backend.follow(
            PublishedPolicy(
                policy_version=number,
                optimizer_step=number,
                weights_path=str(tmp_path / f"v{number}"),
                published_at_ms=0,
            )
        )
        assert backend.policy_version == number
        assert torch.equal(logits_of(backend._model), logits_of(expected))
    assert len(loads) == 1
    assert not torch.equal(logits_of(models[0]), logits_of(models[1]))


@pytest.mark.req("L-7")
def test_an_adapter_finds_its_base_where_it_lies_now_and_no_other(tmp_path: Path) -> None:
    import shutil

    base, moved, other = (tmp_path / name for name in ("base", "moved", "other"))
    shutil.copytree(SHIPPED_MODEL, base)
    expected = logits_of(write_trained(tmp_path / "adapter", base, seed=3))
    base.rename(moved)
    assert torch.equal(logits_of(load_policy(tmp_path / "adapter", base=moved)), expected)
    shutil.copytree(moved, other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(DataError, match=rf"an adapter without its base {base} .*{other} is another model"):
        load_policy(tmp_path / "adapter", base=other)
    with pytest.raises(DataError, match=f"an adapter without its base {base}"):
        load_policy(tmp_path / "adapter")
