"""Beam search: laws on a small model, refusals. tests/conformance holds it to transformers'."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.beam_search import Beam, BeamSearch, BeamSearchOptions, search_beams
from runtime.decoder import Decoder
from runtime.errors import RequestError
from runtime.package import open_package
from runtime.sampling import SamplingOptions
from runtime.text_generator import open_decoder

from .conftest import BYTES_AND_END

GREEDY = SamplingOptions.greedy()

SCORE_ERROR = 1e-5
"""Of sums of float32. Measured: 1e-6."""


@pytest.fixture(scope="module")
def decoder(tiny_fp32: Path) -> Decoder:
    return open_decoder(open_package(tiny_fp32))


def found(decoder: Decoder, beams: BeamSearchOptions, **options: Any) -> tuple[Beam, ...]:
    given = {"sampling": GREEDY, "n_vocab": BYTES_AND_END, "eos_ids": [BYTES_AND_END - 1], "max_new_tokens": 5}
    return search_beams(decoder, np.array([7, 8, 9]), beams=beams, **given | options)


def log_softmax(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = rows.astype(np.float64)
    exact -= exact.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    return result


def test_a_score_is_the_log_probability_of_the_text_by_its_length(decoder: Decoder) -> None:
    for beam in found(decoder, BeamSearchOptions(num_beams=4, length_penalty=0.5), num_return_sequences=4):
        ids = np.array([7, 8, 9, *beam.ids])
        rows = log_softmax(np.concatenate([piece.copy() for piece in decoder.logits(ids[:-1])]))
        total = rows[np.arange(2, len(ids) - 1), beam.ids].sum()
        assert beam.score == pytest.approx(total / len(beam.ids) ** 0.5, rel=SCORE_ERROR)


def test_as_many_beams_as_tokens_find_the_most_probable_text_there_is() -> None:
    """Every text of three tokens out of four, by brute force: the next token depends on the one before."""
    table = log_softmax(np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32)).astype(np.float32)
    search = BeamSearch(BeamSearchOptions(num_beams=16, length_penalty=0.0), eos_ids=[], max_new_tokens=3)
    while not search.done:
        search.advance(np.stack([table[ids[-1] if ids else 0] for ids in search.ids]))
    totals = {(a, b, c): table[0, a] + table[a, b] + table[b, c] for a, b, c in product(range(4), repeat=3)}
    ranked = sorted(totals, key=lambda ids: -totals[ids])[:16]
    assert [beam.ids for beam in search.best(16)] == ranked


def test_ids_without_a_text_are_never_chosen(decoder: Decoder) -> None:
    for beam in found(decoder, BeamSearchOptions(num_beams=3), n_vocab=50, eos_ids=[49], num_return_sequences=3):
        assert max(beam.ids) < 50


def test_bans_hold_in_every_beam(decoder: Decoder) -> None:
    free = found(decoder, BeamSearchOptions(num_beams=3))[0]
    banned = SamplingOptions(do_sample=False, bad_words_ids=[[free.ids[0]]])
    for beam in found(decoder, BeamSearchOptions(num_beams=3), sampling=banned, num_return_sequences=3):
        assert free.ids[0] not in beam.ids


def test_bans_that_leave_too_few_texts_are_refused(decoder: Decoder) -> None:
    all_but_two = SamplingOptions(do_sample=False, bad_words_ids=[[token] for token in range(2, BYTES_AND_END)])
    options = {"sampling": all_but_two, "eos_ids": [], "max_new_tokens": 1}
    assert len(found(decoder, BeamSearchOptions(num_beams=3), **options, num_return_sequences=2)) == 2
    with pytest.raises(RequestError, match="num_return_sequences is 3, but the options leave 2 texts"):
        found(decoder, BeamSearchOptions(num_beams=3), **options, num_return_sequences=3)


def test_sampling_is_refused(decoder: Decoder) -> None:
    with pytest.raises(RequestError, match="beam search does not sample, but do_sample is true"):
        found(decoder, BeamSearchOptions(num_beams=2), sampling=SamplingOptions())


@pytest.mark.parametrize("count", [0, 3])
def test_more_texts_than_beams_are_refused(count: int, decoder: Decoder) -> None:
    with pytest.raises(RequestError, match=f"num_return_sequences is {count}, expected 1 to num_beams, 2"):
        found(decoder, BeamSearchOptions(num_beams=2), num_return_sequences=count)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_beams", 1, "a whole number from 2 up"),
        ("num_beams", True, "a whole number from 2 up"),
        ("length_penalty", float("nan"), "a finite number"),
        ("length_penalty", "1", "a finite number"),
        ("early_stopping", "always", "true, false or 'never'"),
        ("early_stopping", 1, "true, false or 'never'"),
    ],
)
def test_option_out_of_range_is_refused_by_name(name: str, value: Any, expected: str) -> None:
    with pytest.raises(RequestError) as raised:
        BeamSearchOptions(**{"num_beams": 2} | {name: value})
    assert f"{name} is {value!r}, expected {expected}" in str(raised.value)


def test_generation_config_becomes_options() -> None:
    read = BeamSearchOptions.from_generation_config
    assert read({"num_beams": 4, "early_stopping": "never", "length_penalty": None, "top_k": 3}) == BeamSearchOptions(
        num_beams=4, early_stopping="never"
    )
    assert read({"num_beams": 1, "length_penalty": 2.0, "renormalize_logits": True}) is None
    assert read({}) is None
    with pytest.raises(RequestError, match="renormalize_logits"):
        read({"num_beams": 2, "renormalize_logits": True})
