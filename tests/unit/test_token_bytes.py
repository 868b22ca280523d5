"""The byte table: pieces add up to the text, and any bytes can be spelled back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from consumers.token_bytes import TokenBytes, UnspeakableText, token_bytes_of
from tests.builders.tokenizers import (
    byte_fallback_tokenizer,
    encode,
    fusing_tokenizer,
    plain_tokenizer,
    token_id,
)

TOKENIZERS = [plain_tokenizer, fusing_tokenizer, byte_fallback_tokenizer]


@pytest.mark.req("M-4")
@pytest.mark.parametrize("make_tokenizer", TOKENIZERS)
@given(text=st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_the_pieces_of_an_encoding_are_the_bytes_of_the_text(make_tokenizer: Any, text: str) -> None:
    table = token_bytes_of(make_tokenizer())
    ids = encode(make_tokenizer(), text)
    data, ends = table.join(ids)
    assert data == text.encode()
    assert [len(table.join(ids[: i + 1])[0]) for i in range(len(ids))] == ends.tolist()


@pytest.mark.req("M-7")
@pytest.mark.parametrize("make_tokenizer", TOKENIZERS)
@given(data=st.binary(max_size=24))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_spelled_exactly_even_parts_of_characters(make_tokenizer: Any, data: bytes) -> None:
    table = token_bytes_of(make_tokenizer())
    assert table.join(table.spell(data))[0] == data


def test_spelling_without_an_exact_encoding_takes_the_fewest_ordinary_tokens() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "ab": 2, "abab": 3, "?": 4}, unk_token="?"))
    tokenizer.add_special_tokens([AddedToken("aba", special=True)])
    assert token_bytes_of(tokenizer).spell(b"ababab") == [2, 3]


def test_bytes_that_no_token_writes_cannot_be_spelled() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    with pytest.raises(UnspeakableText, match="no ordinary tokens write"):
        token_bytes_of(tokenizer).spell(b"ax")


def test_an_added_token_is_its_literal_text_also_in_a_byte_level_vocabulary() -> None:
    tokenizer = Tokenizer.from_str(plain_tokenizer().to_str())
    tokenizer.add_tokens([AddedToken("Ġé", normalized=False)])
    table = token_bytes_of(tokenizer)
    assert table.pieces[token_id(tokenizer, "Ġé")] == "Ġé".encode()
    assert table.pieces[token_id(tokenizer, "Ġ")] == b" "


def test_tokens_added_after_the_first_use_are_in_the_table() -> None:
    tokenizer = Tokenizer.from_str(plain_tokenizer().to_str())
    before = token_bytes_of(tokenizer)
    tokenizer.add_tokens(["<late>"])
    assert token_bytes_of(tokenizer).text([token_id(tokenizer, "<late>")]) == "<late>"
    assert before.num_ids + 1 == token_bytes_of(tokenizer).num_ids


def test_the_table_is_built_once_for_a_tokenizer() -> None:
    assert token_bytes_of(plain_tokenizer()) is token_bytes_of(plain_tokenizer())


@pytest.mark.parametrize(
    "decoder, token, expected",
    [
        (None, "##a", b"##a"),
        (decoders.WordPiece(), "##a", b"a"),
        (decoders.WordPiece(), "a", b" a"),
        (decoders.BPEDecoder(), "a</w>", b"a "),
        (decoders.Metaspace(), "▁a", b" a"),
        (decoders.ByteFallback(), "<0xE9>", b"\xe9"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()]), "▁<0xE9>", b" <0xE9>"),
        (decoders.ByteLevel(), "Ã©", b"\xc3\xa9"),
        (decoders.ByteLevel(), "猫", "猫".encode()),
    ],
)
def test_a_token_is_read_as_its_decoder_writes_it(decoder: Any, token: str, expected: bytes) -> None:
    tokenizer = Tokenizer(models.WordLevel({token: 0}, unk_token=token))
    tokenizer.decoder = decoder
    assert TokenBytes(tokenizer).pieces[0] == expected


def test_an_encoding_that_changes_the_text_is_refused() -> None:
    tokenizer = Tokenizer.from_str(plain_tokenizer().to_str())
    tokenizer.normalizer = normalizers.Lowercase()
    table = token_bytes_of(tokenizer)
    assert table.encode("Leaf") is None
    assert table.encode("leaf") is not None
    tokenizer.enable_truncation(2)
    assert table.encode("a leaf and more") is None
