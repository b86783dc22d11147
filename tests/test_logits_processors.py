"""Biases, penalties and bans: facts, what they leave alone, refusals. tests/conformance holds them to transformers'."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import RequestError
from runtime.logits_processors import LogitsProcessors
from runtime.sampling import SamplingOptions

ZEROS = np.zeros(6, np.float32)
BANNED = -np.inf


def processed(ids: list[int], *, prompt: int = 1, **options: Any) -> list[float]:
    """Six logits of zero behind some ids."""
    processors = LogitsProcessors(SamplingOptions(**options), n_vocab=6)
    values: list[float] = processors.apply(ZEROS, ids=ids, prompt_length=prompt).tolist()
    return values


def test_without_options_the_logits_themselves_come_back() -> None:
    sampled = SamplingOptions(temperature=0.5, top_k=3, top_p=0.4, min_p=0.1, typical_p=0.5)
    assert LogitsProcessors(sampled, n_vocab=6).apply(ZEROS, ids=[1, 1], prompt_length=1) is ZEROS


def test_logits_that_are_changed_are_a_copy() -> None:
    logits = np.ones(6, np.float32)
    LogitsProcessors(SamplingOptions(repetition_penalty=2.0), n_vocab=6).apply(logits, ids=[1], prompt_length=1)
    assert logits.tolist() == [1] * 6


def test_presence_penalty_counts_a_generated_token_once_and_the_prompt_not() -> None:
    assert processed([0, 1, 2, 2, 3], prompt=2, presence_penalty=0.5) == [0, 0, -0.5, -0.5, 0, 0]


def test_frequency_penalty_counts_a_generated_token_each_time() -> None:
    assert processed([0, 2, 2, 3], prompt=1, frequency_penalty=0.5) == [0, 0, -1.0, -0.5, 0, 0]


def test_presence_and_frequency_penalties_add_up() -> None:
    assert processed([0, 2, 2, 3], presence_penalty=1.0, frequency_penalty=0.5) == [0, 0, -2.0, -1.5, 0, 0]


def test_negative_penalties_ask_for_repetition() -> None:
    assert processed([0, 2], presence_penalty=-1.0) == [0, 0, 1.0, 0, 0, 0]


def test_a_sequences_bias_waits_for_its_beginning() -> None:
    bias = {(1, 2): 3.0, (4,): -1.0}
    assert processed([0, 0, 1], sequence_bias=bias) == [0, 0, 3.0, 0, -1.0, 0]
    assert processed([0, 1, 0], sequence_bias=bias) == [0, 0, 0, 0, -1.0, 0]


def test_a_sequence_of_n_tokens_is_looked_for_behind_n_tokens_or_more() -> None:
    """As transformers does, although n - 1 would do."""
    assert processed([1], sequence_bias={(1, 2): 3.0}) == [0] * 6
    assert processed([1, 1], sequence_bias={(1, 2): 3.0}) == [0, 0, 3.0, 0, 0, 0]


def test_biases_of_one_token_from_two_sequences_add_up() -> None:
    assert processed([0, 0, 1], sequence_bias={2: 1.0, (1, 2): 3.0, (0, 1, 2): 0.0})[2] == 4.0


def test_bad_words_are_not_completed() -> None:
    assert processed([0, 0, 1], bad_words_ids=[[3], [1, 2], [0, 4]]) == [0, 0, BANNED, BANNED, 0, 0]


def test_a_lone_end_id_is_no_bad_word() -> None:
    processors = LogitsProcessors(SamplingOptions(bad_words_ids=[[5], [3]]), n_vocab=6, eos_ids=[5])
    assert processors.apply(ZEROS, ids=[0], prompt_length=1).tolist() == [0, 0, 0, BANNED, 0, 0]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 5))
def test_a_sequence_is_never_written_twice(prompt: list[int], size: int) -> None:
    """By definition: what is banned is what would make the last `size` tokens occur twice."""
    found = processed(prompt, prompt=len(prompt), no_repeat_ngram_size=size)
    for token_id, value in enumerate(found):
        text = [*prompt, token_id]
        grams = [tuple(text[start : start + size]) for start in range(len(text) - size + 1)]
        assert (value == BANNED) == (grams[-1:] != [] and grams[-1] in grams[:-1])


def test_end_ids_wait_for_the_fewest_new_tokens() -> None:
    processors = LogitsProcessors(SamplingOptions(), n_vocab=6, eos_ids=[4, 5], min_new_tokens=2)
    assert processors.apply(ZEROS, ids=[0, 0, 1], prompt_length=2).tolist() == [0, 0, 0, 0, BANNED, BANNED]
    assert processors.apply(ZEROS, ids=[0, 0, 1, 1], prompt_length=2).tolist() == [0] * 6


def test_prompt_ids_that_no_token_has_are_passed_over() -> None:
    """An embedding may have more rows than there are tokens; a prompt of ids may name them."""
    assert processed([7, 1, 7, 1], repetition_penalty=2.0, no_repeat_ngram_size=2) == [0] * 6
    assert processed([1, 7, 1], no_repeat_ngram_size=2) == [0] * 6


@pytest.mark.parametrize(
    ("options", "eos_ids"),
    [
        (SamplingOptions(sequence_bias={6: 1.0}), []),
        (SamplingOptions(bad_words_ids=[[1, 6]]), []),
        (SamplingOptions(), [6]),
    ],
)
def test_ids_that_are_not_in_the_vocabulary_are_refused(options: SamplingOptions, eos_ids: list[int]) -> None:
    with pytest.raises(RequestError, match=r"token ids \[6\], expected 0 to 5"):
        LogitsProcessors(options, n_vocab=6, eos_ids=eos_ids)


def test_options_that_leave_no_token_are_refused() -> None:
    with pytest.raises(RequestError, match="the options forbid every token behind 2 others"):
        processed([0, 0], bad_words_ids=[[token_id] for token_id in range(6)])
