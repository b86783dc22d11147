"""Sampling: facts of the random stream, laws of the distribution, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runtime.errors import MachineError, RequestError
from runtime.sampling import SamplingOptions, choose_token, fresh_seed, random_uniform
from runtime.truncation import rank_largest

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

PLAIN = SamplingOptions(top_k=0)
DRAWS = 4000
CHI_SQUARE_DEVIATIONS = 5.0  # the seeds are fixed; measured: below 2

words = st.integers(0, 2**64 - 1)
finite_logits = hnp.arrays(
    np.float32, st.integers(1, 300), elements=st.floats(-50, 50, width=32) | st.sampled_from([0.0, 1.0, -np.inf])
).filter(lambda logits: bool(np.isfinite(logits).any()))


def expected_probabilities(logits: Float32Array, options: SamplingOptions) -> Float64Array:
    """The distribution by its definition: float64, a full sort, one rule after the other. [V] float64"""
    scaled = logits.astype(np.float64) / options.temperature
    ranked = sorted(range(logits.size), key=lambda token: (-scaled[token], token))
    ranked = ranked[: options.top_k or None]
    weights = np.exp(scaled[ranked] - scaled[ranked[0]])
    weights /= weights.sum()
    if options.top_p < 1:  # else a token behind a sum that rounds to 1 would be dropped
        before = np.cumsum(weights) - weights
        weights[before >= options.top_p] = 0
    probabilities = np.zeros(logits.size)
    probabilities[ranked] = weights / weights.sum()
    return probabilities


def draw(logits: Float32Array, options: SamplingOptions, seed: int) -> list[int]:
    return [choose_token(logits, options, random_uniform(seed, 0, position)) for position in range(DRAWS)]


def test_philox_gives_the_published_known_answer() -> None:
    # kat_vectors of Random123: philox4x64, 10 rounds, counter and key all zero.
    assert random_uniform(0, 0, 0) == (0x16554D9ECA36314C >> 11) / 2**53


@given(words, words, words)
def test_random_stream_is_numpys_philox(seed: int, sample: int, position: int) -> None:
    counter = (position - 1) % 2**256  # numpy counts up before it draws
    word = np.random.Philox(key=seed | sample << 64, counter=counter).random_raw()
    assert random_uniform(seed, sample, position) == (int(word) >> 11) / 2**53


def test_samples_and_positions_have_numbers_of_their_own() -> None:
    numbers = {random_uniform(1, sample, position) for sample in range(40) for position in range(40)}
    assert len(numbers) == 1600


@given(words, words, words)
def test_random_number_is_in_the_half_open_unit_interval(seed: int, sample: int, position: int) -> None:
    assert 0.0 <= random_uniform(seed, sample, position) < 1.0


def test_fresh_seeds_are_seeds_and_differ() -> None:
    seeds = {SamplingOptions(seed=fresh_seed()).seed for _ in range(4)}
    assert len(seeds) > 1


@given(finite_logits, st.integers(1, 300))
def test_ranking_is_by_value_then_by_index(values: Float32Array, count: int) -> None:
    by_definition = sorted(range(values.size), key=lambda i: (-values[i], i))[:count]
    assert rank_largest(values, min(count, values.size)).tolist() == by_definition


@pytest.mark.parametrize("count", [1, 40, 256, 257, 5000, 50257])
@pytest.mark.parametrize("distinct", [3, 100, 10**6])
def test_ranking_of_a_whole_vocabulary(count: int, distinct: int) -> None:
    values = np.random.default_rng(count).integers(0, distinct, 50257).astype(np.float32)
    assert np.array_equal(rank_largest(values, count), np.argsort(-values, kind="stable")[:count])


@given(finite_logits)
def test_greedy_is_the_first_of_the_largest(logits: Float32Array) -> None:
    assert choose_token(logits, SamplingOptions.greedy(), 0.5) == logits.tolist().index(logits.max())


@given(finite_logits, st.floats(0, 1, exclude_max=True))
def test_top_k_of_one_is_greedy_even_among_equals(logits: Float32Array, uniform: float) -> None:
    assert choose_token(logits, SamplingOptions(top_k=1), uniform) == int(logits.argmax())


@given(
    finite_logits,
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([0.01, 0.7, 1.0, 3.0]),
    st.integers(0, 400),
    st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
)
@example(np.array([0, 27], np.float32), 0.0, 0.7, 0, 1.0)  # the first is rare, and must not be lost to rounding
@example(np.array([0, 2e-16], np.float32), 0.0, 0.01, 0, 0.05)  # two logits, one float32 weight
def test_chosen_token_is_one_that_the_rules_keep(
    logits: Float32Array, uniform: float, temperature: float, top_k: int, top_p: float
) -> None:
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    token = choose_token(logits, options, uniform)
    # A hair above top_p: float32 weights may round one more token into the nucleus.
    roomier = replace(options, top_p=min(1.0, top_p + 1e-5))
    assert expected_probabilities(logits, roomier)[token] > 0


@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        SamplingOptions(top_k=10),
        SamplingOptions(temperature=0.6, top_k=0),
        SamplingOptions(temperature=1.7, top_k=30, top_p=0.8),
        SamplingOptions(top_k=0, top_p=0.9),
        SamplingOptions(top_k=0, top_p=0.3),
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(options: SamplingOptions) -> None:
    logits = np.random.default_rng(7).normal(scale=1.5, size=50).astype(np.float32)
    probabilities = expected_probabilities(logits, options)
    observed = np.bincount(draw(logits, options, seed=11), minlength=logits.size)
    kept = probabilities > 0
    assert not observed[~kept].any()
    expected = DRAWS * probabilities[kept]
    chi_square = float(((observed[kept] - expected) ** 2 / expected).sum())
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + CHI_SQUARE_DEVIATIONS * math.sqrt(2 * freedom)


def test_uniform_number_maps_through_the_inverse_cumulative_distribution() -> None:
    logits = np.log(np.array([0.2, 0.5, 0.3], dtype=np.float32))
    assert [choose_token(logits, PLAIN, uniform) for uniform in (0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-53)] == [
        *(0, 0, 1, 1, 2, 2)
    ]


def test_nucleus_keeps_the_token_that_crosses_top_p() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.4], dtype=np.float32))
    assert set(draw(logits, SamplingOptions(top_k=0, top_p=0.6), seed=3)) == {1, 2}


def test_nucleus_of_equals_keeps_the_lower_ids() -> None:
    logits = np.zeros(8, dtype=np.float32)
    assert set(draw(logits, SamplingOptions(top_k=0, top_p=0.5), seed=3)) == {0, 1, 2, 3}


def test_top_k_among_equals_keeps_the_lower_ids() -> None:
    logits = np.array([0, 1, 1, 1, 1], dtype=np.float32)
    assert set(draw(logits, SamplingOptions(top_k=2), seed=3)) == {1, 2}


def test_top_p_counts_what_top_k_left() -> None:
    # Of all tokens 0.6 needs two; of the two that top_k leaves, the first holds 0.5 / 0.9 and needs the second for 0.6.
    logits = np.log(np.array([0.5, 0.4, 0.1], dtype=np.float32))
    assert set(draw(logits, SamplingOptions(top_k=2, top_p=0.55), seed=3)) == {0}
    assert set(draw(logits, SamplingOptions(top_k=0, top_p=0.55), seed=3)) == {0, 1}


def test_forbidden_token_is_never_chosen() -> None:
    logits = np.array([-np.inf, 0, -np.inf, 0, -np.inf], dtype=np.float32)
    for top_k in (0, 4):
        assert set(draw(logits, SamplingOptions(top_k=top_k), seed=5)) == {1, 3}


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e30, 1.7e308])
def test_extreme_temperatures_reach_their_limits(temperature: float) -> None:
    logits = np.array([3e38, -3e38, 2.9e38, -np.inf], dtype=np.float32)
    chosen = set(draw(logits, replace(PLAIN, temperature=temperature), seed=5))
    assert chosen == ({0} if temperature < 1e38 else {0, 1, 2})


def test_a_vocabulary_of_one_token_needs_no_luck() -> None:
    assert choose_token(np.array([-3.0], dtype=np.float32), SamplingOptions(top_p=0.1), 0.99) == 0


@pytest.mark.parametrize(
    ("logits", "fault"),
    [([0, np.nan, 1], "a logit is nan"), ([0, np.inf], "a logit is inf"), ([-np.inf, -np.inf], "every logit is -inf")],
)
@pytest.mark.parametrize("options", [PLAIN, SamplingOptions(), SamplingOptions.greedy()], ids=str)
def test_broken_logits_are_the_machines_fault(logits: list[float], fault: str, options: SamplingOptions) -> None:
    with pytest.raises(MachineError, match=fault) as raised:
        choose_token(np.array(logits, dtype=np.float32), options, 0.5)
    assert "runtime.verify" in str(raised.value)


def test_defaults_are_those_of_openais_samples() -> None:
    assert SamplingOptions() == SamplingOptions(do_sample=True, temperature=1.0, top_k=40, top_p=1.0, seed=None)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("do_sample", 1, "expected true or false"),
        ("temperature", 0, "do_sample=False"),
        ("temperature", 0.0, "do_sample=False"),
        ("temperature", -1.0, "expected a finite number above 0"),
        ("temperature", math.nan, "expected a finite number above 0"),
        ("temperature", math.inf, "expected a finite number above 0"),
        ("temperature", True, "expected a finite number above 0"),
        ("temperature", "1", "expected a finite number above 0"),
        ("top_k", -1, "expected a whole number from 1 up, or 0 for off"),
        ("top_k", 40.0, "expected a whole number from 1 up, or 0 for off"),
        ("top_k", True, "expected a whole number from 1 up, or 0 for off"),
        ("top_p", 0.0, "expected a number above 0 and up to 1"),
        ("top_p", 1.01, "expected a number above 0 and up to 1"),
        ("top_p", math.nan, "expected a number above 0 and up to 1"),
        ("top_p", True, "expected a number above 0 and up to 1"),
        ("seed", -1, "expected a whole number from 0 to 2**64 - 1"),
        ("seed", 2**64, "expected a whole number from 0 to 2**64 - 1"),
        ("seed", False, "expected a whole number from 0 to 2**64 - 1"),
    ],
)
def test_option_out_of_range_is_refused_by_name(name: str, value: Any, expected: str) -> None:
    with pytest.raises(RequestError) as raised:
        SamplingOptions(**{name: value})
    message = str(raised.value)
    assert f"{name} is {value!r}" in message
    assert expected in message


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(RequestError, match=r"temperature is -1.*top_k is -2.*top_p is 3"):
        SamplingOptions(temperature=-1, top_k=-2, top_p=3)


def test_generation_config_becomes_the_defaults() -> None:
    values = {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": None, "eos_token_id": 50256}
    assert SamplingOptions.from_generation_config(values) == SamplingOptions(
        do_sample=False, temperature=0.7, top_p=0.9, top_k=40
    )


def test_generation_config_out_of_range_is_refused() -> None:
    with pytest.raises(RequestError, match="top_p is 0"):
        SamplingOptions.from_generation_config({"top_p": 0})
