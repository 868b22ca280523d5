"""`rollstream model adapt`: stock-shaped folders of every family become usable, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from broker_schemas.errors import DataError
from broker_schemas.method.coordinates import CoordVocabulary, coordinate_token
from broker_schemas.method.model_folder import check_model_folder, load_policy, resolve_model_dir
from broker_schemas.method.prompt import PromptBuilder, load_tokenizer
from rollstream.models.adapting import adapt_model
from rollstream.models.coordinate_rows import coordinate_rows
from tests.builders.stock_models import FAMILIES, Family, make_stock_folder

pytestmark = pytest.mark.req("L-1")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def is_vocabulary(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


@pytest.mark.parametrize(("tied", "shard", "dtype"), [(True, "1GB", "bfloat16"), (False, "100KB", "float32")])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_added_and_every_other_weight_stays(
    tmp_path: Path, family: Family, tied: bool, shard: str, dtype: str
) -> None:
    stock = make_stock_folder(
        tmp_path / "stock", family, tied=tied, max_shard_size=shard, dtype=getattr(torch, dtype)
    )
    seen: list[tuple[int, int]] = []
    summary = adapt_model(stock, tmp_path / "new", progress=lambda done, total: seen.append((done, total)))

    before, after = weights_of(stock), weights_of(summary.folder)
    assert after.keys() == before.keys()
    assert sum(map(is_vocabulary, after)) == (1 if tied else 2)
    num_words = len(load_tokenizer(stock).get_vocab())
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        kept = num_words if is_vocabulary(name) else len(tensor)
        assert torch.equal(tensor[:kept], before[name][:kept])
        if is_vocabulary(name):
            assert len(tensor) == summary.num_rows
            assert len(tensor) % 64 == 0
            assert len(tensor) >= num_words + 1000
    assert 0.9 < seen[-1][0] / seen[-1][1] <= 1
    model = load_policy(summary.folder, dtype)
    assert model.get_output_embeddings().weight.shape[0] == summary.num_rows
    is_shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_shared == tied


def test_everything_beside_the_vocabulary_stays_and_the_tokenizers_agree(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    stock = make_stock_folder(tmp_path / "stock")
    (stock / "notes").mkdir()
    (stock / "notes" / "LICENSE").write_text("free")
    (stock / "old_weights.bin").write_bytes(b"0")
    summary = adapt_model(stock, tmp_path / "new")

    changed = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    for file in stock.rglob("*"):
        if file.is_file() and file.name not in changed | {"old_weights.bin"}:
            assert (summary.folder / file.relative_to(stock)).read_bytes() == file.read_bytes()
    assert "left out: old_weights.bin" in str(summary)
    old, new = (json.loads((f / "config.json").read_text()) for f in (stock, summary.folder))
    new["text_config"]["vocab_size"] = old["text_config"]["vocab_size"]
    assert old == new
    theirs, ours = AutoTokenizer.from_pretrained(summary.folder), load_tokenizer(summary.folder)
    text = f'<|im_start|>say {coordinate_token(0)}{coordinate_token(999)} 12"'
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False).ids
    stock_special = AutoTokenizer.from_pretrained(stock).all_special_tokens
    assert set(stock_special) <= set(theirs.all_special_tokens)


def test_a_sharded_index_keeps_its_map_and_counts_the_new_rows(tmp_path: Path) -> None:
    stock = make_stock_folder(tmp_path / "stock", tied=False, max_shard_size="100KB")
    folder = adapt_model(stock, tmp_path / "new").folder
    old, new = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (stock, folder))

    assert new["weight_map"] == old["weight_map"]
    grown = sum(t.nbytes for t in weights_of(folder).values()) - sum(
        t.nbytes for t in weights_of(stock).values()
    )
    assert new["metadata"]["total_size"] - old["metadata"]["total_size"] == grown > 0


def test_neighbouring_bins_are_neighbours_and_hundreds_lie_near_their_digit() -> None:
    generator = torch.Generator().manual_seed(0)
    digits = torch.randn(10, 128, generator=generator) + 0.5
    rows = coordinate_rows(digits)

    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    nearest = distances.argmin(dim=1) - torch.arange(1000)
    assert (nearest.abs() <= 2).all()
    steps = [float(distances.diagonal(offset=k).mean()) for k in (1, 3, 10, 40, 100, 400)]
    assert steps == sorted(steps)
    spokes = digits - digits.mean(dim=0)
    assert int(torch.cosine_similarity(rows[750] - digits.mean(dim=0), spokes).argmax()) in (6, 7)
    assert (rows - digits.mean(dim=0)).norm(dim=1).mean() == pytest.approx(float(spokes.norm(dim=1).mean()))


def test_a_second_time_nothing_is_done(tmp_path: Path) -> None:
    stock = make_stock_folder(tmp_path / "stock")
    first = adapt_model(stock, tmp_path / "new")
    assert "1000 coordinate tokens added" in str(first)
    written = (first.folder / "model.safetensors").stat().st_mtime_ns

    assert str(adapt_model(stock, first.folder)).startswith("nothing to do")
    assert str(adapt_model(first.folder, tmp_path / "third")).startswith("nothing to do")
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == written
    assert not (tmp_path / "third").exists()


def test_tokens_without_rows_get_rows(tmp_path: Path) -> None:
    stock = make_stock_folder(tmp_path / "stock")
    new = adapt_model(stock, tmp_path / "new").folder
    shutil.copy(new / "tokenizer.json", stock / "tokenizer.json")
    with pytest.raises(DataError, match=r"has 512 rows.*rollstream model adapt"):
        check_model_folder(stock)

    mended = adapt_model(stock, tmp_path / "mended")

    assert mended.num_new_tokens == 0
    assert torch.equal(
        *(weights_of(f)["model.language_model.embed_tokens.weight"] for f in (new, mended.folder))
    )
    assert f"{mended.num_rows:,} rows" in str(mended)


def test_a_padded_vocabulary_uses_its_padding_first(tmp_path: Path) -> None:
    stock = make_stock_folder(tmp_path / "stock", padding_rows=700)
    summary = adapt_model(stock, tmp_path / "new")
    num_words = len(load_tokenizer(stock).get_vocab())

    vocabulary = CoordVocabulary.from_token_to_id(load_tokenizer(summary.folder).token_to_id)
    assert vocabulary.ids.tolist() == list(range(num_words, num_words + 1000))
    assert summary.num_rows == -(-(num_words + 1000) // 64) * 64


@pytest.mark.parametrize("model_type", ["smolvlm", "internvl", None])
def test_another_family_is_refused_everywhere(tmp_path: Path, model_type: str | None) -> None:
    stock = make_stock_folder(tmp_path / "stock")
    config = json.loads((stock / "config.json").read_text()) | {"model_type": model_type}
    (stock / "config.json").write_text(json.dumps(config))

    for use in (lambda: adapt_model(stock, tmp_path / "new"), lambda: load_policy(stock)):
        with pytest.raises(DataError, match=f"got model_type {model_type!r}, expected one of qwen2_vl"):
            use()


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_or_cut_shard_is_named(tmp_path: Path, with_index: bool) -> None:
    stock = make_stock_folder(tmp_path / "stock", max_shard_size="100KB")
    shards = sorted(stock.glob("*.safetensors"))
    if not with_index:
        (stock / "model.safetensors.index.json").unlink()
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-7])
    with pytest.raises(DataError, match=f"{shards[1].name}: not a whole safetensors file"):
        adapt_model(stock, tmp_path / "new")
    shards[1].unlink()
    with pytest.raises(DataError, match=f"1 shards are missing, first {shards[1].name}"):
        adapt_model(stock, tmp_path / "new")
    with pytest.raises(DataError, match="1 shards are missing"):
        check_model_folder(stock)
    assert not (tmp_path / "new").exists()


def test_an_untied_model_without_its_head_is_refused(tmp_path: Path) -> None:
    stock = make_stock_folder(tmp_path / "stock", tied=False)
    tensors = load_file(stock / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, stock / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(DataError, match=r"no lm_head.weight, and config.json does not tie it"):
        adapt_model(stock, tmp_path / "new")


def test_a_tokenizer_that_splits_a_coordinate_is_refused(tmp_path: Path) -> None:
    folder = adapt_model(make_stock_folder(tmp_path / "stock"), tmp_path / "new").folder
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    # in the plain vocabulary a token is reached by merges alone, and there are none for these
    plain, added = content["model"]["vocab"], content["added_tokens"]
    plain |= {coordinate_token(index): len(plain) + index for index in range(1000)}
    content["added_tokens"] = [token for token in added if "coord_" not in token["content"]]
    for place, token in enumerate(content["added_tokens"]):
        token["id"] = len(plain) + place
    path.write_text(json.dumps(content))

    for use in (check_model_folder, load_policy, lambda f: adapt_model(f, tmp_path / "other")):
        with pytest.raises(DataError, match=r"splits <\|coord_0\|> into \d+ tokens"):
            use(folder)


def test_an_adapter_without_its_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    with pytest.raises(DataError, match="an adapter without its base 'some/base'.*model export"):
        resolve_model_dir(tmp_path)


def test_source_and_strange_destinations_are_kept(tmp_path: Path) -> None:
    stock = make_stock_folder(tmp_path / "stock")
    for inside in (stock, stock / "new"):
        with pytest.raises(DataError, match="expected a folder beside"):
            adapt_model(stock, inside)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="did not make"):
        adapt_model(stock, other)
    assert (other / "thesis.txt").read_text() == "mine"


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    stock = make_stock_folder(tmp_path / "stock")
    tensors = load_file(stock / "model.safetensors")
    name = "model.language_model.embed_tokens.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, stock / "model.safetensors")
    with pytest.raises(DataError, match="is I8, expected one of F32, BF16, F16"):
        adapt_model(stock, tmp_path / "new")


def test_the_prompt_of_an_adapted_folder_is_built_as_before(tmp_path: Path) -> None:
    folder = adapt_model(make_stock_folder(tmp_path / "stock", "qwen2_5_vl"), tmp_path / "new").folder
    prompts = PromptBuilder(folder)
    ids = prompts.build_ids([(1, 4, 4)])
    assert (ids == prompts.image_token_id).sum() == 4
