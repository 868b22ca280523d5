"""What must hold for every token sequence: mutated payloads, random tokens and random bytes."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_schemas.method.payload import render_payload
from consumers import scanner, validation
from consumers.fragments import encode_fragment
from consumers.parsing import ParsedRollout, parse_rollout
from consumers.token_bytes import token_bytes_of
from tests.builders.tokenizers import (
    byte_fallback_tokenizer,
    coord_vocabulary,
    encode,
    fusing_tokenizer,
    make_box,
    make_polygon,
    plain_tokenizer,
    random_objects,
)

TOKENIZERS = {
    "plain": plain_tokenizer,
    "fusing": fusing_tokenizer,
    "byte_fallback": byte_fallback_tokenizer,
}
SNIPPETS = [
    *("{", "}", "[", "]", '"', ",", ":", "\\", "}}", '"},', '"]', "]}", "<|im_end|>", "<|im_", "end|>"),
    *("é", "猫", "null", "1e999", '"<|coord_7|>"', "<|coord_9|>", " ", "\n"),
    *('"object_1": {', '"object_2": 5, ', '"desc": "', '"bbox_2d": [', '"poly": [[', '"object\\u005f3": {'),
    *('{"a": {"b": [1]}}', ', "object_40": {}'),
]


def check_invariants(ids: list[int], tokenizer: Any, parsed: ParsedRollout) -> None:
    table = token_bytes_of(tokenizer)
    own, _ = table.join(ids)
    kept = table.join(parsed.prefix_ids)[0] + parsed.open_tail.encode()
    assert kept.decode(errors="replace") == parsed.prefix_text
    assert not set(parsed.open_tail) - set('"[]{}, \t\n\r')
    if parsed.is_invalid_rollout:
        assert kept == b"{"
        return
    assert own.startswith(kept)
    assert b"<|im_end|>" not in kept
    check_token_exact(ids, parsed, table)
    bin_by_id = coord_vocabulary(tokenizer).bin_by_id
    for item in parsed.objects:
        assert [bin_by_id[parsed.prefix_ids[index]] for index in item.token_indices] == list(item.bins)
        assert [ids[index] for index in item.token_indices] == [
            parsed.prefix_ids[index] for index in item.token_indices
        ]
    numbers = [item.number for item in parsed.objects]
    assert len(set(numbers)) == len(numbers)
    assert parsed.next_object_number > max(numbers, default=0)


def check_token_exact(ids: list[int], parsed: ParsedRollout, table: Any) -> None:
    """All but the spelling of the one cut token are the rollout's own tokens."""
    same = 0
    while same < min(len(ids), len(parsed.prefix_ids)) and parsed.prefix_ids[same] == ids[same]:
        same += 1
    respelled, _ = table.join(parsed.prefix_ids[same:])
    assert table.pieces[ids[same]].startswith(respelled) if respelled else same == len(parsed.prefix_ids)


def check_closing(tokenizer: Any, parsed: ParsedRollout) -> None:
    """The sequence with what is appended: its structure closes, its JSON parses, its numbers differ."""
    missing = [make_box("café"), make_polygon()]
    fragment = encode_fragment(parsed, missing, tokenizer, coord_vocabulary(tokenizer))
    written, _ = token_bytes_of(tokenizer).join([*parsed.prefix_ids, *fragment.ids.tolist()])
    assert depth_after(written) == (0, False)
    if "malformed_json" in parsed.dropped:
        return  # a kept object may be no JSON by itself
    pairs = json.loads(written.decode(), object_pairs_hook=lambda items: items)
    numbers = [int(key[7:]) for key, _ in pairs if key.startswith("object_") and key[7:].isdecimal()]
    assert numbers[-2:] == [parsed.next_object_number, parsed.next_object_number + 1]
    assert max(numbers[:-2], default=0) < parsed.next_object_number


def depth_after(data: bytes) -> tuple[int, bool]:
    """A byte-by-byte machine, written apart from the scanner: nesting left open, and whether in a string."""
    stack, in_string, escaped = [], False, False
    for byte in data.decode(errors="replace"):
        if in_string:
            if escaped:
                escaped = False
            elif byte == "\\":
                escaped = True
            else:
                in_string = byte != '"'
        elif byte == '"':
            in_string = True
        elif byte in "{[":
            stack.append(byte)
        elif byte in "}]":
            assert stack, "closed more than was opened"
            assert stack.pop() + byte in ("{}", "[]")
    return len(stack), in_string


def check(tokenizer: Any, ids: list[int]) -> None:
    parsed = parse_rollout(ids, tokenizer, coord_vocabulary(tokenizer))
    check_invariants(ids, tokenizer, parsed)
    check_closing(tokenizer, parsed)


@cache
def payload_text(seed: int) -> str:
    return render_payload(random_objects(seed, 4)).text + "<|im_end|>"


@st.composite
def mutated_payloads(draw: st.DrawFn) -> str:
    text = payload_text(draw(st.integers(0, 11)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        text = text[:start] + draw(st.sampled_from(["", *SNIPPETS])) + text[end:]
    return text[: draw(st.integers(0, 2 * len(text)))]


@pytest.mark.req("M-3", "M-4")
@given(text=mutated_payloads())
@settings(max_examples=300, deadline=None)
def test_what_is_written_plainly_is_read_as_it_is_in_the_long_way(text: str) -> None:
    tokenizer = plain_tokenizer()
    ids = encode(tokenizer, text)
    read = parse_rollout(ids, tokenizer, coord_vocabulary(tokenizer))
    nothing = re.compile(rb"(?!)")
    with pytest.MonkeyPatch.context() as long_way:
        long_way.setattr(scanner, "_PLAIN_ENTRY", nothing)
        long_way.setattr(validation, "_PLAIN_OBJECT", nothing)
        assert parse_rollout(ids, tokenizer, coord_vocabulary(tokenizer)) == read


@pytest.mark.req("M-3", "M-4", "M-6", "M-7")
@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=mutated_payloads())
@settings(max_examples=150, deadline=None)
def test_every_invariant_holds_for_mutated_payloads(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    check(tokenizer, encode(tokenizer, text))


@pytest.mark.req("M-3", "M-7")
@pytest.mark.parametrize("name", TOKENIZERS)
@given(parts=st.lists(st.sampled_from(SNIPPETS), max_size=25))
@settings(max_examples=150, deadline=None)
def test_every_invariant_holds_for_structure_in_any_order(name: str, parts: list[str]) -> None:
    tokenizer = TOKENIZERS[name]()
    check(tokenizer, [token_id for part in ["{", *parts] for token_id in encode(tokenizer, part)])


@pytest.mark.req("M-3", "M-4", "M-7")
@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_every_invariant_holds_for_payloads_with_tokens_swapped_dropped_or_inserted(
    name: str, data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = encode(tokenizer, payload_text(data.draw(st.integers(0, 11))))
    for _ in range(data.draw(st.integers(0, 5))):
        at = data.draw(st.integers(0, len(ids)))
        inserted = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=2))
        ids[at : at + data.draw(st.integers(0, 2))] = inserted
    check(tokenizer, ids)


@pytest.mark.req("M-3", "M-7")
@pytest.mark.parametrize("name", TOKENIZERS)
@given(raw=st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_every_invariant_holds_for_random_bytes_after_a_brace(name: str, raw: bytes) -> None:
    tokenizer = TOKENIZERS[name]()
    table = token_bytes_of(tokenizer)
    check(tokenizer, [token_id for byte in b"{" + raw for token_id in table.spell(bytes([byte]))])


@pytest.mark.req("M-3")
@given(ids=st.lists(st.integers(-(2**40), 2**40), max_size=30))
@settings(max_examples=100, deadline=None)
def test_no_sequence_of_numbers_raises(ids: list[int]) -> None:
    parse_rollout(ids, plain_tokenizer(), coord_vocabulary(plain_tokenizer()))


@pytest.mark.req("M-3")
@pytest.mark.parametrize("value", ["[" * 20000, '{"a": ' + "[" * 9000 + "]" * 9000 + "}}"])
def test_nesting_deeper_than_the_stack_does_not_raise(value: str) -> None:
    tokenizer = plain_tokenizer()
    ids = encode(tokenizer, '{"object_1": ' + value)
    assert parse_rollout(ids, tokenizer, coord_vocabulary(tokenizer)).objects == ()
