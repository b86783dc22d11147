"""Where a text ends: stop strings however it is cut into pieces, and numbers of tokens that fit or are refused."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import RequestError
from runtime.stopping import StoppingOptions, StopStrings
from runtime.tokenizer import Tokenizer

few_letters = st.text("abc", max_size=20)
strings = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def by_definition(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the first stop string that is complete, the longest of those that end together."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))], True
    return text, False


def streamed(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher, certain = StopStrings(stops), ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        certain += text
        if stopped:
            return certain, True
    return certain + matcher.finish(), False


@given(few_letters, strings, st.sets(st.integers(0, 20)))
def test_the_text_before_a_stop_string_is_the_same_however_it_is_cut(
    text: str, stops: list[str], cuts: set[int]
) -> None:
    places = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    assert streamed([text[a:b] for a, b in pairwise(places)], stops) == by_definition(text, stops)


@given(few_letters, strings)
def test_no_more_is_held_back_than_could_begin_a_stop_string(text: str, stops: list[str]) -> None:
    matcher, pushed, certain = StopStrings(stops), "", ""
    for letter in text:
        piece, stopped = matcher.push(letter)
        pushed, certain = pushed + letter, certain + piece
        if stopped:
            return
        held = pushed[len(certain) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_nothing_comes_after_the_stop() -> None:
    matcher = StopStrings(["\n\n"])
    assert matcher.push("One.\n") == ("One.", False)
    assert matcher.push("\nTwo.") == ("", True)
    assert matcher.push("Three.") == ("", True)
    assert matcher.finish() == ""


def test_a_stop_string_that_begins_and_ends_within_tokens_is_found(demo_fp32: Path) -> None:
    tokenizer = Tokenizer.load(demo_fp32 / "tokenizer.json")
    text = "The old man looked at the sea, and the sea looked at him."
    stop = "ooked at hi"
    start = text.rindex(stop)
    decoder = tokenizer.stream()
    pieces = [decoder.push(token_id) for token_id in tokenizer.encode(text).tolist()]
    assert {start, start + len(stop)}.isdisjoint(accumulate(map(len, pieces)))
    assert streamed(pieces, [stop]) == (text[:start], True)


def test_without_stop_strings_every_piece_is_certain() -> None:
    matcher = StopStrings([])
    assert [matcher.push(piece) for piece in ("a", "", "b")] == [("a", False), ("", False), ("b", False)]


def test_options_become_tuples_and_can_be_hashed() -> None:
    options = StoppingOptions(eos_token_id=[5, 3, 5], stop_strings=["a", "b", "a"])
    assert (options.eos_ids, options.stop_strings) == ((5, 3), ("a", "b"))
    assert hash(options) == hash(StoppingOptions(eos_token_id=(5, 3), stop_strings=("a", "b")))
    assert StoppingOptions(eos_token_id=7, stop_strings="end").stop_strings == ("end",)


def test_generation_config_becomes_options() -> None:
    values = {"eos_token_id": [1, 2], "min_new_tokens": 3, "max_new_tokens": None, "max_length": 50, "top_k": 3}
    expected = StoppingOptions(eos_token_id=[1, 2], min_new_tokens=3, max_length=50)
    assert StoppingOptions.from_generation_config(values, eos_token_id=9) == expected
    assert StoppingOptions.from_generation_config({}, eos_token_id=9) == StoppingOptions(eos_token_id=9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0, 128)),
        ({"max_new_tokens": 5, "max_length": 12}, (0, 5)),
        ({"max_length": 12}, (0, 2)),
        ({"max_length": 12, "min_length": 11}, (1, 2)),
        ({"min_length": 4, "min_new_tokens": 2}, (2, 128)),
    ],
)
def test_numbers_of_new_tokens_behind_a_prompt_of_ten(options: dict[str, int], expected: tuple[int, int]) -> None:
    assert StoppingOptions(**options).new_tokens(10, n_ctx=512) == expected


def test_the_default_is_what_there_is_room_for() -> None:
    assert StoppingOptions().new_tokens(500, n_ctx=512) == (0, 12)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"max_new_tokens": 503}, "a prompt of 10 tokens and max_new_tokens 503 do not fit the model's context of 512"),
        ({"max_length": 10}, "max_length is 10, and a prompt of 10 tokens leaves nothing of it"),
        ({"max_length": 513}, "max_length 513, so max_new_tokens 503 do not fit"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens is 5, expected 0 to max_new_tokens, 4"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options: dict[str, int], fault: str) -> None:
    with pytest.raises(RequestError, match=fault):
        StoppingOptions(**options).new_tokens(10, n_ctx=512)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_new_tokens", 0, "a whole number above 0"),
        ("max_length", 2.0, "a whole number above 0"),
        ("min_new_tokens", -1, "a whole number from 0 up"),
        ("min_length", True, "a whole number from 0 up"),
        ("stop_strings", ["a", ""], "strings of at least one character"),
        ("stop_strings", [1], "strings of at least one character"),
        ("stop_strings", 1, "strings of at least one character"),
        ("eos_token_id", -1, "token ids"),
        ("eos_token_id", [True], "token ids"),
        ("eos_token_id", ["a"], "token ids"),
        ("eos_token_id", 1.5, "token ids"),
    ],
)
def test_option_out_of_range_is_refused_by_name(name: str, value: Any, expected: str) -> None:
    with pytest.raises(RequestError) as raised:
        StoppingOptions(**{name: value})
    assert f"{name} is {value!r}, expected {expected}" in str(raised.value)
