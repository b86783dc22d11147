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
from runtime.generation_config import NEUTRAL
from runtime.sampling import SamplingOptions, choose_token, fresh_seed, random_uniform, warp_logits
from runtime.truncation import BLOCK, rank_largest

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

PLAIN = SamplingOptions(top_k=0)
DRAWS = 4000
CHI_SQUARE_DEVIATIONS = 5.0  # the seeds are fixed; measured: below 2

SUM_ERROR = 1e-6  # of a cumulative probability, from float32 weights; measured: 3e-9

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


def several_blocks(n_vocab: int) -> Float32Array:
    """Logits whose largest stand on both sides of every border between blocks."""
    logits = np.random.default_rng(n_vocab).normal(size=n_vocab).astype(np.float32)
    for start in range(0, n_vocab, BLOCK):
        logits[[start - 1, start]] += np.float32(7)
    return logits


@pytest.mark.parametrize("n_vocab", [BLOCK, BLOCK + 1, 2 * BLOCK + 1, 50257])
@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_a_nucleus_out_of_several_blocks_is_that_of_its_definition(n_vocab: int, top_p: float) -> None:
    logits, options = several_blocks(n_vocab), SamplingOptions(top_k=0, top_p=top_p)
    assert np.array_equal(warp_logits(logits, options) > -np.inf, expected_probabilities(logits, options) > 0)


@pytest.mark.parametrize("n_vocab", [BLOCK, BLOCK + 1, 2 * BLOCK + 1, 50257])
def test_every_block_has_its_part_of_the_distribution(n_vocab: int) -> None:
    logits = several_blocks(n_vocab)
    sums = np.cumsum(expected_probabilities(logits, PLAIN))
    for uniform in (*np.random.default_rng(0).random(50), 0.0, 1 - 2**-53):
        token = choose_token(logits, PLAIN, uniform)
        assert sums[token - 1] * (token > 0) <= uniform + SUM_ERROR
        assert uniform - SUM_ERROR <= sums[token]


def test_openais_nucleus_does_not_pass_top_p() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.4], dtype=np.float32))
    assert set(draw(logits, SamplingOptions(top_k=0, top_p=0.6, rule="openai"), seed=3)) == {1}
    assert set(draw(logits, SamplingOptions(top_k=0, top_p=0.95, rule="openai"), seed=3)) == {1, 2}


def test_openais_nucleus_keeps_at_least_one() -> None:
    logits = np.array([0, 0.1, 0], dtype=np.float32)
    assert set(draw(logits, SamplingOptions(top_k=0, top_p=0.01, rule="openai"), seed=3)) == {1}


@given(finite_logits, st.sampled_from([0.7, 1.0, 3.0]), st.integers(0, 40), st.sampled_from([0.05, 0.3, 0.6, 0.95]))
def test_openais_rule_by_its_definition(logits: Float32Array, temperature: float, top_k: int, top_p: float) -> None:
    """Tokens whose cumulative probability is at most top_p among what temperature and top_k left, at least one."""
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, rule="openai")
    kept = set(np.flatnonzero(warp_logits(logits, options) > -np.inf).tolist())
    probabilities = expected_probabilities(logits, replace(options, top_p=1.0))
    ranked = sorted(range(logits.size), key=lambda token: (-logits[token], token))
    sums = np.cumsum(probabilities[ranked])
    # A hair to both sides: float32 weights may round one token more or less into the nucleus.
    fewest, most = (max(1, int((sums <= top_p + hair).sum())) for hair in (-1e-5, 1e-5))
    assert set(ranked[:fewest]) <= kept <= set(ranked[:most])


def test_min_p_is_a_share_of_the_most_probable_after_the_temperature() -> None:
    logits = np.log(np.array([0.5, 0.2, 0.1], dtype=np.float32))
    assert set(draw(logits, SamplingOptions(top_k=0, min_p=0.3), seed=3)) == {0, 1}
    assert set(draw(logits, SamplingOptions(top_k=0, min_p=0.3, temperature=2.0), seed=3)) == {0, 1, 2}
    assert set(draw(logits, SamplingOptions(top_k=0, min_p=1.0), seed=3)) == {0}


def test_typical_p_leaves_out_what_is_too_probable() -> None:
    # The entropy of 0.4 and sixty times 0.01 is that of a token of probability 0.044: nearer to 0.01 than to 0.4.
    probabilities = np.full(61, 0.01, np.float32)
    probabilities[7] = 0.4
    assert 7 not in draw(np.log(probabilities), SamplingOptions(top_k=0, typical_p=0.5), seed=3)


def test_typical_p_of_equals_keeps_the_lower_ids() -> None:
    logits = np.zeros(8, dtype=np.float32)
    assert set(draw(logits, SamplingOptions(top_k=0, typical_p=0.5), seed=3)) == {0, 1, 2, 3}


@given(
    finite_logits,
    st.builds(
        SamplingOptions,
        temperature=st.sampled_from([0.7, 1.0, 3.0]),
        top_k=st.integers(0, 40),
        top_p=st.sampled_from([0.3, 0.9, 1.0]),
        min_p=st.sampled_from([0.0, 0.1, 1.0]),
        typical_p=st.sampled_from([0.2, 0.9, 1.0]),
    ),
    st.floats(0, 1, exclude_max=True),
)
def test_warped_logits_are_those_that_a_token_is_chosen_by(
    logits: Float32Array, options: SamplingOptions, uniform: float
) -> None:
    warped = warp_logits(logits, options)
    assert warped[choose_token(logits, options, uniform)] > -np.inf
    kept = np.flatnonzero(warped > -np.inf)
    assert warped[kept].tolist() == (logits[kept] / options.temperature).tolist()


@pytest.mark.parametrize("temperature", [5e-324, 1e-40])
def test_logits_warped_by_a_temperature_near_zero_are_still_a_distribution(temperature: float) -> None:
    logits = np.array([2, 3, -np.inf, 0], dtype=np.float32)
    assert warp_logits(logits, replace(PLAIN, temperature=temperature)).tolist() == [-np.inf, 0, -np.inf, -np.inf]


def test_greedy_choice_warps_nothing() -> None:
    logits = np.arange(4, dtype=np.float32)
    assert warp_logits(logits, SamplingOptions.greedy()) is logits


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
        ("min_p", -0.1, "expected a number from 0 (off) to 1"),
        ("min_p", False, "expected a number from 0 (off) to 1"),
        ("min_p", 1.5, "expected a number from 0 (off) to 1"),
        ("typical_p", 0, "expected a number above 0 and up to 1"),
        ("rule", "gpt2", "expected hugging_face or openai"),
        ("repetition_penalty", 0.0, "expected a finite number above 0"),
        ("presence_penalty", math.inf, "expected a finite number"),
        ("frequency_penalty", "1", "expected a finite number"),
        ("no_repeat_ngram_size", 1.0, "expected a whole number from 1 up, or 0 for off"),
        ("sequence_bias", {"a": 1.0}, "expected pairs of token ids and a finite number"),
        ("sequence_bias", {(): 1.0}, "expected pairs of token ids and a finite number"),
        ("sequence_bias", {(1,): math.inf}, "expected pairs of token ids and a finite number"),
        ("sequence_bias", [1, 2], "expected pairs of token ids and a finite number"),
        ("bad_words_ids", [[]], "expected sequences of token ids"),
        ("bad_words_ids", [[-1]], "expected sequences of token ids"),
        ("bad_words_ids", [[True]], "expected sequences of token ids"),
        ("bad_words_ids", ["bad"], "expected sequences of token ids"),
        ("bad_words_ids", [5], "expected sequences of token ids"),
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


def test_openais_rule_refuses_what_it_does_not_know() -> None:
    with pytest.raises(RequestError, match=r"rule is 'openai', which has no min_p \(0.1\) and no typical_p"):
        SamplingOptions(rule="openai", min_p=0.1)


def test_options_with_sequences_are_equal_and_hashed_whatever_form_they_were_given_in() -> None:
    spelled = SamplingOptions(sequence_bias={5: 1, (1, 2): 0.5}, bad_words_ids=[[3], (3,), [np.int64(4)]])
    as_json = SamplingOptions(sequence_bias=[[[5], 1.0], [[1, 2], 0.5]], bad_words_ids=[[3], [4]])
    assert spelled == as_json
    assert hash(spelled) == hash(as_json)
    assert replace(spelled, top_k=3).sequence_bias == (((5,), 1.0), ((1, 2), 0.5))


def test_generation_config_becomes_the_defaults() -> None:
    values = {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": None, "eos_token_id": 50256}
    assert SamplingOptions.from_generation_config(values) == SamplingOptions(
        do_sample=False, temperature=0.7, top_p=0.9, top_k=40
    )


def test_every_option_that_hugging_face_has_is_read() -> None:
    values = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "typical_p": 0.8,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "sequence_bias": [[[1, 2], 0.5]],
        "bad_words_ids": [[3]],
    }
    assert SamplingOptions.from_generation_config(values) == SamplingOptions(**values)


@pytest.mark.parametrize("name", NEUTRAL)
def test_generation_config_that_asks_for_more_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"asks for {name} 7, which this runtime does not take"):
        SamplingOptions.from_generation_config({name: 7})


@pytest.mark.parametrize("off", [None, "neutral"])
def test_generation_config_may_spell_out_what_is_off(off: str | None) -> None:
    values = {name: neutral if off else None for name, neutral in NEUTRAL.items()}
    assert SamplingOptions.from_generation_config(values | {"suppress_tokens": []}) == SamplingOptions()


def test_generation_config_may_say_what_changes_no_text() -> None:
    values = {
        "_from_model_config": True,
        "transformers_version": "4.57.6",
        "bos_token_id": 50256,
        "pad_token_id": 50256,
        "use_cache": False,
        "output_scores": True,
        "prompt_lookup_num_tokens": 4,
    }
    assert SamplingOptions.from_generation_config(values) == SamplingOptions()


def test_generation_config_out_of_range_is_refused() -> None:
    with pytest.raises(RequestError, match="top_p is 0"):
        SamplingOptions.from_generation_config({"top_p": 0})
