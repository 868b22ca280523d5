"""Parsing of rollouts: each rule of section 4 and each drop reason, on tokens of real tokenizers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from broker_schemas.method.payload import render_payload
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
    token_id,
)

TOKENIZERS = [plain_tokenizer, fusing_tokenizer, byte_fallback_tokenizer]
BOX = '"bbox_2d": ["<|coord_1|>", "<|coord_2|>", "<|coord_30|>", "<|coord_40|>"]'
GOOD = f'{{"desc": "a", {BOX}}}'


def parse(text: str, tokenizer: Any = None) -> ParsedRollout:
    chosen = tokenizer or plain_tokenizer()
    return parse_rollout(encode(chosen, text), chosen, coord_vocabulary(chosen))


@pytest.mark.req("M-3", "M-4")
@pytest.mark.parametrize("make_tokenizer", TOKENIZERS)
def test_a_payload_is_read_back_with_its_bins_and_the_tokens_that_carry_them(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    vocabulary = coord_vocabulary(tokenizer)
    for seed in range(20):
        objects = random_objects(seed, 5)
        parsed = parse(render_payload(objects).text + "<|im_end|>", tokenizer)
        assert [(item.desc, item.geometry, item.bins) for item in parsed.objects] == [
            (item.desc, item.geometry, item.bins) for item in objects
        ]
        assert [item.number for item in parsed.objects] == [1, 2, 3, 4, 5]
        for item in parsed.objects:
            tokens = [parsed.prefix_ids[index] for index in item.token_indices]
            assert tokens == vocabulary.ids[list(item.bins)].tolist()
        assert (parsed.dropped, parsed.truncated, parsed.is_invalid_rollout) == ({}, False, False)
        assert parsed.next_object_number == 6


@pytest.mark.req("M-7")
@pytest.mark.parametrize("make_tokenizer", TOKENIZERS)
def test_the_prefix_stays_open_after_the_last_object_where_one_token_holds_more_braces(
    make_tokenizer: Any,
) -> None:
    tokenizer = make_tokenizer()
    text = render_payload([make_box()]).text
    ids = encode(tokenizer, text + "<|im_end|>")
    parsed = parse(text + "<|im_end|>", tokenizer)
    assert parsed.prefix_text == text[:-1]
    assert token_bytes_of(tokenizer).text(parsed.prefix_ids) == text.removesuffix('"]}}')
    assert parsed.open_tail == '"]}'
    assert list(parsed.prefix_ids) == ids[: len(parsed.prefix_ids)]


@pytest.mark.req("M-7")
def test_the_end_token_stops_a_rollout_also_where_it_is_fused_into_another_token() -> None:
    tokenizer = fusing_tokenizer()
    head = encode(tokenizer, render_payload([make_box()]).text[:-2])
    rest = encode(tokenizer, f', "object_9": {GOOD}}}')
    parsed = parse_rollout(
        [*head, token_id(tokenizer, "}}<|im_end|>"), *rest], tokenizer, coord_vocabulary(tokenizer)
    )
    assert [item.number for item in parsed.objects] == [1]
    assert parsed.prefix_text == render_payload([make_box()]).text[:-1]
    assert parsed.next_object_number == 2
    assert not parsed.truncated


@pytest.mark.req("M-7")
def test_the_end_token_inside_a_string_cuts_the_object_it_stands_in() -> None:
    parsed = parse(f'{{"object_1": {GOOD}, "object_2": {{"desc": "b<|im_end|>", {BOX}}}}}')
    assert [item.number for item in parsed.objects] == [1]
    assert parsed.truncated
    assert parsed.prefix_text.endswith("]}")


@pytest.mark.req("M-7")
@pytest.mark.parametrize(
    "text", ["", "   ", "<|im_end|>", "Here are the objects: {}", "[1, 2]", "\x0b{}", "<|coord_1|>{}"]
)
def test_anything_that_does_not_start_with_a_brace_falls_back_to_an_open_brace(text: str) -> None:
    parsed = parse(text)
    assert parsed.is_invalid_rollout
    assert (parsed.prefix_text, parsed.objects, parsed.next_object_number) == ("{", (), 1)
    assert (parsed.prefix_ids, parsed.open_tail) == ((), "{")
    assert not parsed.holds_entry


@pytest.mark.req("M-7")
@pytest.mark.parametrize("text, prefix", [("{}", "{"), (" \n{ }", " \n{"), ('{"note": 1}', "{")])
def test_an_empty_answer_is_no_invalid_rollout(text: str, prefix: str) -> None:
    parsed = parse(text)
    assert not parsed.is_invalid_rollout
    assert not parsed.truncated
    assert (parsed.prefix_text, parsed.holds_entry, parsed.dropped) == (prefix, False, {})


REASONS = [
    ("malformed_json", '{"desc": "a", "bbox_2d": oops}'),
    ("malformed_json", '{"desc": "a", "score": NaN}'),
    ("malformed_json", '{"desc": "\\ud800", ' + BOX + "}"),
    ("malformed_json", '{"desc": "line\nbreak", ' + BOX + "}"),
    ("key_invalid", '{"desc": "a", "score": 1, ' + BOX + "}"),
    ("key_invalid", '{"desc": "a", ' + BOX + ", " + BOX + "}"),
    ("key_invalid", '{"desc": "a", "poly": [], ' + BOX + "}"),
    ("key_invalid", '{"desc": "a", "desc": "b", ' + BOX + "}"),
    ("key_invalid", '{"desc": "a", "colour": "red", "size": 3}'),
    ("unknown_geom", '{"desc": "a", "colour": "red"}'),
    ("missing_desc", "{" + BOX + "}"),
    ("missing_desc", '{"desc": " ", ' + BOX + "}"),
    ("missing_desc", '{"desc": 3, ' + BOX + "}"),
    ("missing_geom", '{"desc": "a"}'),
    ("unknown_geom", '{"desc": "a", "point_2d": ["<|coord_1|>", "<|coord_2|>"]}'),
    ("wrong_arity", '{"desc": "a", "bbox_2d": ["<|coord_1|>", "<|coord_2|>", "<|coord_3|>"]}'),
    ("wrong_arity", '{"desc": "a", "bbox_2d": []}'),
    (
        "wrong_arity",
        '{"desc": "a", "bbox_2d": [["<|coord_1|>", "<|coord_2|>"], ["<|coord_3|>", "<|coord_4|>"]]}',
    ),
    ("non_coord_token", '{"desc": "a", "bbox_2d": [1, 2, 3, 4]}'),
    ("non_coord_token", '{"desc": "a", "bbox_2d": [1, 2, 3]}'),
    ("non_coord_token", '{"desc": "a", "bbox_2d": null}'),
    ("non_coord_token", '{"desc": "a", "bbox_2d": {"x1": "<|coord_1|>"}}'),
    ("non_coord_token", '{"desc": "a", "bbox_2d": ["<|coord_1|>", 2, "<|coord_30|>", "<|coord_40|>"]}'),
    ("non_coord_token", '{"desc": "a", "bbox_2d": ["<|coord_1|>", "<|coord_2|>", "<|coord_1000|>"]}'),
    ("non_coord_token", '{"desc": "a", "poly": [[1, 2], [3, 4], [5, 6]]}'),
    ("non_coord_token", '{"desc": "a", "poly": ["<|coord_1|>", "12"]}'),
    ("wrong_arity", '{"desc": "a", "bbox_2d": "<|coord_1|>"}'),
    (
        "wrong_arity",
        '{"desc": "a", "poly": [["<|coord_1|>", "<|coord_2|>"], ["<|coord_3|>", "<|coord_4|>"]]}',
    ),
    ("wrong_arity", '{"desc": "a", "poly": [["<|coord_1|>"], ["<|coord_2|>", "<|coord_3|>"]]}'),
    (
        "wrong_arity",
        '{"desc": "a", "poly": ["<|coord_1|>", "<|coord_1|>", "<|coord_2|>", "<|coord_1|>", "<|coord_1|>", '
        '"<|coord_2|>", "<|coord_2|>"]}',
    ),
    (
        "non_coord_token",
        '{"desc": "a", "bbox_2d": ["x<|coord_1|>", "<|coord_2|>", "<|coord_30|>", "<|coord_40|>"]}',
    ),
    (
        "bbox_invalid",
        '{"desc": "a", "bbox_2d": ["<|coord_30|>", "<|coord_2|>", "<|coord_30|>", "<|coord_40|>"]}',
    ),
    (
        "bbox_invalid",
        '{"desc": "a", "bbox_2d": ["<|coord_1|>", "<|coord_41|>", "<|coord_30|>", "<|coord_40|>"]}',
    ),
]


@pytest.mark.req("M-3")
@pytest.mark.parametrize("reason, value", REASONS)
def test_an_invalid_object_is_dropped_for_one_reason_and_stays_in_the_prefix(reason: str, value: str) -> None:
    text = f'{{"object_4": {value}, "object_2": {GOOD}}}'
    parsed = parse(text)
    assert parsed.dropped == {reason: 1}
    assert [item.number for item in parsed.objects] == [2]
    assert parsed.prefix_text == text[:-1]
    assert parsed.next_object_number == 5


@pytest.mark.req("M-3")
def test_the_first_of_two_objects_with_the_same_number_wins_even_when_it_is_invalid() -> None:
    parsed = parse(f'{{"object_1": {GOOD}, "object_01": {GOOD}, "object_3": {{}}, "object_3": {GOOD}}}')
    assert [item.number for item in parsed.objects] == [1]
    assert parsed.dropped == {"duplicate_key": 2, "missing_desc": 1}


@pytest.mark.req("M-3")
def test_a_key_spelled_with_escapes_counts_as_the_key_it_means() -> None:
    parsed = parse(f'{{"object\\u005f1": {GOOD}, "object_1": {GOOD}}}')
    assert parsed.dropped == {"duplicate_key": 1}
    assert parsed.next_object_number == 2


@pytest.mark.req("M-7")
def test_a_brace_that_closes_over_an_open_bracket_cuts_there_and_drops_all_that_follows() -> None:
    broken = '{"desc": "a", "bbox_2d": ["<|coord_1|>", "<|coord_2|>"}'
    parsed = parse(f'{{"object_1": {GOOD}, "object_2": {broken}, "object_3": {GOOD}}}')
    assert [item.number for item in parsed.objects] == [1]
    assert parsed.dropped == {"unbalanced": 2}
    assert parsed.prefix_text == f'{{"object_1": {GOOD}'
    assert parsed.next_object_number == 2
    assert parsed.truncated


@pytest.mark.req("M-7")
def test_a_stray_closing_bracket_is_unbalanced_too() -> None:
    parsed = parse(f'{{"object_1": {{"desc": "a"], {BOX}}}, "object_2": {GOOD}}}')
    assert parsed.dropped == {"unbalanced": 2}
    assert parsed.prefix_text == "{"


@pytest.mark.req("M-7")
@pytest.mark.parametrize(
    "between", [" ", ", oops, ", ',, "x": 1, ', ', "x": tru, ', ', "x": "y" "z": 1, ', ", ] "]
)
def test_text_between_objects_that_is_no_json_ends_the_prefix(between: str) -> None:
    parsed = parse(f'{{"object_1": {GOOD}{between}"object_2": {GOOD}}}')
    assert parsed.prefix_text == f'{{"object_1": {GOOD}'
    assert sum(parsed.dropped.values()) == 1


@pytest.mark.req("M-3")
def test_a_foreign_entry_between_objects_stays_and_a_numbered_one_counts() -> None:
    text = f'{{"note": [1, {{"object_50": 2}}], "object_7": 3, "object_1": {GOOD}'
    parsed = parse(text + "}")
    assert parsed.prefix_text == text
    assert parsed.dropped == {"key_invalid": 1}
    assert parsed.next_object_number == 8


@pytest.mark.req("M-3")
def test_a_number_too_long_to_count_on_from_ends_the_prefix() -> None:
    parsed = parse(f'{{"object_1": {GOOD}, "object_{"9" * 5000}": {GOOD}}}')
    assert parsed.next_object_number == 2
    assert parsed.dropped == {"key_invalid": 1}


@pytest.mark.req("M-4")
def test_a_coordinate_token_in_a_description_is_text_and_never_captured() -> None:
    parsed = parse(f'{{"object_1": {{"desc": "at <|coord_5|>, bbox_2d: [", {BOX}}}}}')
    (item,) = parsed.objects
    assert item.desc == "at <|coord_5|>, bbox_2d: ["
    assert item.bins == (1, 2, 30, 40)
    assert len(item.token_indices) == 4


@pytest.mark.req("M-4")
def test_coordinates_spelled_by_ordinary_tokens_are_not_captured() -> None:
    tokenizer = plain_tokenizer()
    spelled = [i for character in "<|coord_1|>" for i in encode(tokenizer, character)]
    head, tail = f'{{"object_1": {{"desc": "a", {BOX}}}}}'.split("<|coord_1|>")
    ids = [*encode(tokenizer, head), *spelled, *encode(tokenizer, tail)]
    assert parse_rollout(ids, tokenizer, coord_vocabulary(tokenizer)).dropped == {"wrong_arity": 1}


@pytest.mark.req("M-4")
def test_a_coordinate_that_first_appears_when_the_cut_token_is_spelled_anew_is_not_captured() -> None:
    tokenizer = Tokenizer.from_str(plain_tokenizer().to_str())
    fused = '<|coord_40|>"]}}'
    tokenizer.add_tokens([AddedToken(fused, normalized=False)])
    head = encode(plain_tokenizer(), f'{{"object_1": {GOOD}}}'.removesuffix(fused))
    parsed = parse_rollout(
        [*head, token_id(tokenizer, fused)], tokenizer, coord_vocabulary(plain_tokenizer())
    )
    assert parsed.dropped == {"wrong_arity": 1}
    assert token_id(tokenizer, "<|coord_40|>") in parsed.prefix_ids[len(head) :]


@pytest.mark.req("M-4")
def test_characters_split_over_tokens_do_not_shift_what_is_captured() -> None:
    tokenizer = plain_tokenizer()
    parsed = parse(render_payload([make_box("猫𓀀🙂é"), make_polygon("ß漢")]).text, tokenizer)
    assert [item.desc for item in parsed.objects] == ["猫𓀀🙂é", "ß漢"]
    assert parsed.objects[1].bins == make_polygon().bins


@pytest.mark.parametrize(
    "text, expected",
    [
        (f'{{"object_1": {GOOD}', True),
        (f'{{"object_1": {GOOD}, "object_2": {{"desc": "b', True),
        (f'{{"object_1": {GOOD}, "object_2": {{"desc": "b", "bbox_2d": ["<|coord_1|>"', True),
        (f'{{"object_1": {GOOD}}} and then {{ more', False),
        ("{", True),
    ],
)
@pytest.mark.req("M-7")
def test_truncated_says_whether_anything_was_open_at_the_end(text: str, expected: bool) -> None:
    parsed = parse(text)
    assert parsed.truncated is expected
    assert parsed.dropped == {}


@pytest.mark.req("M-3")
def test_a_flat_polygon_and_one_of_pairs_read_the_same() -> None:
    flat = ", ".join(f'"<|coord_{value}|>"' for value in (1, 2, 30, 4, 15, 60))
    parsed = parse(f'{{"object_1": {{"desc": "leaf", "poly": [{flat}]}}}}')
    assert parsed.objects[0].bins == parse(render_payload([make_polygon()]).text).objects[0].bins


@pytest.mark.parametrize("ids", [[-1], [10**6, 5], [2**70], [-(2**70), 123]])
@pytest.mark.req("M-3")
def test_ids_outside_the_vocabulary_do_not_raise(ids: list[int]) -> None:
    tokenizer = plain_tokenizer()
    parsed = parse_rollout(ids, tokenizer, coord_vocabulary(tokenizer))
    assert parsed.is_invalid_rollout


def test_a_wrapped_tokenizer_and_an_array_of_ids_give_the_same() -> None:
    class Wrapper:
        backend_tokenizer = plain_tokenizer()

    ids = encode(plain_tokenizer(), render_payload([make_box()]).text)
    vocabulary = coord_vocabulary(plain_tokenizer())
    from_list = parse_rollout(ids, plain_tokenizer(), vocabulary)
    assert parse_rollout(np.asarray(ids, dtype=np.int32), Wrapper(), vocabulary) == from_list


def test_matching_starts_without_torch_and_transformers() -> None:
    code = (
        "import sys, consumers.record_matching; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
