"""Means, and how far chance may have moved them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantization.standard_error import Estimate, clustered_mean

SIZES = st.lists(st.integers(1, 5), min_size=2, max_size=8)


def test_clusters_of_one_give_the_usual_standard_error() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    estimate = clustered_mean(values, np.ones(4, np.int64))
    assert estimate.mean == 4.0
    assert estimate.standard_error == pytest.approx(values.std(ddof=1) / 2)


def test_values_that_repeat_within_a_cluster_tell_nothing_new() -> None:
    """Three copies of each value: a standard error over values would shrink by the root of three."""
    values = np.array([1.0, 2.0, 4.0, 9.0])
    copied = clustered_mean(np.repeat(values, 3), np.full(4, 3))
    assert copied.standard_error == pytest.approx(clustered_mean(values, np.ones(4, np.int64)).standard_error)


def test_differences_within_clusters_that_cancel_out_are_no_uncertainty() -> None:
    assert clustered_mean([1, -1, 5, -5], np.array([2, 2])) == Estimate(0.0, 0.0)


def test_the_standard_error_is_the_spread_of_means_over_many_texts() -> None:
    """Of 4,000 texts of 30 windows, in each of which one draw moves every token; sizes of 5 and 15 in turn."""
    rng = np.random.default_rng(0)
    sizes = np.tile([5, 15], 15)
    texts = [np.repeat(rng.normal(size=30), sizes) + 0.5 * rng.normal(size=300) for _ in range(4000)]
    estimates = [clustered_mean(text, sizes) for text in texts]
    spread = np.std([estimate.mean for estimate in estimates])
    told = np.sqrt(np.mean([(estimate.standard_error or 0) ** 2 for estimate in estimates]))
    assert told == pytest.approx(spread, rel=0.05)  # measured: 0.9% more


@given(SIZES, st.integers(0, 1000))
def test_the_mean_is_of_values_not_of_clusters(sizes: list[int], seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=sum(sizes))
    assert clustered_mean(values, np.array(sizes)).mean == pytest.approx(values.mean(), abs=1e-12)


def test_one_cluster_tells_nothing_about_chance() -> None:
    assert clustered_mean([1, 2, 3], np.array([3])) == Estimate(2.0, None)
    assert Estimate(2.0, None).exponential() == Estimate(math.exp(2), None)


def test_an_exponential_carries_the_error_on() -> None:
    nats = Estimate(3.0, 1e-4)
    carried = nats.exponential()
    assert carried.mean == math.exp(3)
    assert carried.standard_error == pytest.approx(math.exp(3.0001) - math.exp(3), rel=1e-3)


def test_the_exponential_of_nonsense_is_a_number() -> None:
    assert math.isfinite(Estimate(1e6, 1.0).exponential().mean)
