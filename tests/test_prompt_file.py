"""A file of prompts: a line is text, or an object with options, or an error of its own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtime import GPT2EdgeError, Request, SamplingOptions
from runtime.prompt_file import read_requests

DEFAULT = Request(max_new_tokens=20, sampling=SamplingOptions(temperature=0.5, seed=7))


def read(*lines: str | bytes, default: Request = DEFAULT) -> list[Request | GPT2EdgeError]:
    return list(read_requests((line if isinstance(line, bytes) else line.encode() for line in lines), default))


def read_one(**options: Any) -> Request:
    (request,) = read(json.dumps(options))
    assert isinstance(request, Request), request
    return request


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("Once upon\n", "Once upon"),
        ("a\r\n", "a"),
        ("\n", ""),
        ("  spaces stay  \n", "  spaces stay  "),
        ("“Yes”", "“Yes”"),
        ('"Yes," said he\n', '"Yes," said he'),
        ("[1] a footnote", "[1] a footnote"),
        ("5", "5"),
    ],
)
def test_a_plain_line_is_a_prompt_as_it_stands(line: str, prompt: str) -> None:
    (request,) = read(line)
    assert isinstance(request, Request)
    assert (request.prompt, request.max_new_tokens) == (prompt, 20)


def test_an_object_replaces_what_it_names_and_nothing_else() -> None:
    request = read_one(prompt="a\nb", max_new_tokens=3, top_k=5, overflow="truncate", deadline_ms=50)
    assert (request.prompt, request.max_new_tokens, request.overflow, request.deadline_ms) == (
        "a\nb",
        3,
        "truncate",
        50,
    )
    assert request.sampling == SamplingOptions(temperature=0.5, top_k=5, seed=7)


def test_a_prompt_may_be_ids() -> None:
    assert read_one(prompt=[1, 2]).prompt == [1, 2]


def test_each_line_has_a_seed_of_its_own_and_may_name_another() -> None:
    requests = read("a", "a", '{"prompt": "a", "seed": 3}', "a")
    assert [request.sampling.seed for request in requests if isinstance(request, Request) and request.sampling] == [
        7,
        8,
        3,
        10,
    ]


def test_the_largest_seed_is_followed_by_zero() -> None:
    default = Request(sampling=SamplingOptions(seed=2**64 - 1))
    seeds = [request.sampling.seed for request in read("a", "b", default=default) if request.sampling]  # type: ignore[union-attr]
    assert seeds == [2**64 - 1, 0]


def test_who_names_a_sampling_option_wants_to_sample() -> None:
    lines = ('{"prompt": "a", "top_k": 3}', '{"prompt": "a"}', '{"prompt": "a", "do_sample": false, "top_k": 3}')
    requests = read(*lines, default=Request(sampling=SamplingOptions.greedy()))
    assert [request.sampling.do_sample for request in requests if request.sampling] == [True, False, False]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"caf\xe9", "byte 3 is no UTF-8 (unexpected end of data); convert the file first"),
        ("{", "begins with { but is no JSON object (Expecting property name"),
        ('{"prompt": "a"} and more', "begins with { but is no JSON object (Extra data"),
        (
            '{"prompt": "a", "topk": 3}',
            "unknown options topk, expected some of bad_words_ids, deadline_ms, do_sample",
        ),
        ('{"prompt": "a", "cancel": 1, "logits_processor": 2}', "unknown options cancel, logits_processor"),
        ('{"max_new_tokens": 3}', 'has no prompt, expected "prompt" with text or a list of token ids'),
        ('{"prompt": 3}', "has no prompt"),
        ('{"prompt": "a", "temperature": 0}', "temperature is 0, expected a finite number above 0"),
        ('{"prompt": "a", "seed": NaN}', "seed is nan"),
    ],
)
def test_what_is_wrong_with_a_line_stands_in_its_place(line: str | bytes, message: str) -> None:
    before, error, after = read("a", line, "b")
    assert isinstance(error, GPT2EdgeError)
    assert message in str(error)
    assert [request.prompt for request in (before, after) if isinstance(request, Request)] == ["a", "b"]


def test_a_penalty_leaves_greedy_greedy() -> None:
    default = Request(sampling=SamplingOptions.greedy())
    for options in ({"no_repeat_ngram_size": 3}, {"repetition_penalty": 1.2}, {"bad_words_ids": [[1]]}):
        (request,) = read(json.dumps({"prompt": "a"} | options), default=default)
        assert isinstance(request, Request) and request.sampling is not None
        assert not request.sampling.do_sample


def test_a_line_nested_without_end_is_an_error_of_its_own() -> None:
    first, second = read('{"prompt":' + "[" * 100_000, "b")
    assert isinstance(first, GPT2EdgeError) and isinstance(second, Request)
