"""What measured values say: percentiles as numpy's, and ratios that see a slow-down and not the order of loading."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.benchmark.distribution import Distribution, ratio_of_medians, ratio_of_rounds, relative_spread

LOADS = np.repeat(np.arange(8), 3)  # 24 rounds


def noisy(seed: int, factor: float = 1.0) -> list[float]:
    """24 rounds around 10 ms with 3% of noise and an outlier."""
    values = 10 * factor * np.exp(0.03 * np.random.default_rng(seed).standard_normal(24))
    values[seed % 24] *= 4
    return [float(value) for value in values]


def test_percentiles_of_one_to_a_hundred() -> None:
    distribution = Distribution.of([float(value) for value in range(1, 101)])
    assert (distribution.n, distribution.mean, distribution.min, distribution.max) == (100, 50.5, 1, 100)
    assert (distribution.p50, distribution.p90, distribution.p99) == (50.5, pytest.approx(90.1), pytest.approx(99.01))
    assert distribution.std == pytest.approx(29.011, abs=1e-3)


def test_one_value_is_all_its_figures_and_has_no_spread() -> None:
    distribution = Distribution.of([7.0])
    assert {distribution.mean, distribution.p50, distribution.p99, distribution.min, distribution.max} == {7.0}
    assert distribution.std == 0


def test_no_values_have_no_distribution() -> None:
    with pytest.raises(ValueError, match="no values"):
        Distribution.of([])


def test_spread_is_of_the_middle_half() -> None:
    assert relative_spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert relative_spread([3.0, 3.0, 3.0, 3.0, 900.0]) == 0


def test_the_same_rounds_are_once_each_other() -> None:
    interval = ratio_of_rounds(noisy(0), noisy(0), LOADS.tolist(), confidence=0.99)
    assert (interval.value, interval.low, interval.high) == (1, 1, 1)


@pytest.mark.parametrize("seed", range(5))
def test_a_tenth_more_is_seen_through_noise_and_outliers(seed: int) -> None:
    interval = ratio_of_rounds(noisy(seed, 1.1), noisy(seed + 100), LOADS.tolist(), confidence=0.995)
    assert 1.02 < interval.low < interval.value < interval.high
    assert interval.value == pytest.approx(1.1, abs=0.04)


def test_what_the_order_of_loading_does_cancels() -> None:
    """The first that is loaded is 8% slower: ours behind even loads, the baseline behind odd ones."""
    slow_first = np.where(LOADS % 2 == 0, 1.08, 1.0)
    ours, theirs = np.array(noisy(1)) * slow_first, np.array(noisy(2)) * (2.08 - slow_first)
    interval = ratio_of_rounds(ours.tolist(), theirs.tolist(), LOADS.tolist(), confidence=0.99)
    assert interval.low < 1 < interval.high
    assert interval.value == pytest.approx(1, abs=0.03)


def test_a_drift_of_the_machine_cancels_in_rounds() -> None:
    drift = np.linspace(1, 2, 24)
    interval = ratio_of_rounds((10 * drift).tolist(), (10 * drift).tolist(), LOADS.tolist(), confidence=0.99)
    assert (interval.low, interval.high) == (1, 1)


def test_swapped_sides_give_the_inverse() -> None:
    ours, theirs = noisy(3, 1.2), noisy(4)
    forward = ratio_of_rounds(ours, theirs, LOADS.tolist(), confidence=0.9)
    backward = ratio_of_rounds(theirs, ours, LOADS.tolist(), confidence=0.9)
    assert forward.value == pytest.approx(1 / backward.value)
    assert forward.low == pytest.approx(1 / backward.high, rel=0.01)


def test_medians_of_different_times_are_compared_by_their_ratio() -> None:
    interval = ratio_of_medians(noisy(5, 1.5), noisy(6)[:9], confidence=0.99)
    assert 1.3 < interval.low < interval.value < interval.high < 1.7


def test_more_confidence_is_a_wider_interval() -> None:
    narrow, wide = (ratio_of_medians(noisy(7), noisy(8), confidence=each) for each in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high
