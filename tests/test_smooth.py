"""Factors that even inputs out, and inputs that nothing evens out."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from quantization.int8 import INT8_MAX
from quantization.smooth import OUTLIERS, Evening, even_out, find_outliers, smoothing_factors

T, K, N = 400, 64, 48

Float32Array = NDArray[np.float32]


def inputs_and_weight(seed: int = 0) -> tuple[Float32Array, Float32Array]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((T, K), dtype=np.float32), rng.standard_normal((K, N), dtype=np.float32)


def int8_error(inputs: Float32Array, weight: Float32Array) -> float:
    """Mean squared error of a product with one scale a row and one a column."""
    rows = np.abs(inputs).max(axis=1, keepdims=True) / INT8_MAX
    columns = np.abs(weight).max(axis=0) / INT8_MAX
    product = (np.rint(inputs / rows) * rows) @ (np.rint(weight / columns) * columns)
    return float(np.square(product - inputs @ weight).mean())


def factors_for(inputs: Float32Array, weight: Float32Array) -> Float32Array:
    return smoothing_factors(inputs, weight, highest=INT8_MAX, group=len(weight))


def test_the_product_stays() -> None:
    inputs, weight = inputs_and_weight()
    inputs[:, :3] *= 40
    factors = factors_for(inputs, weight)
    np.testing.assert_allclose((inputs / factors) @ (weight * factors[:, None]), inputs @ weight, rtol=0, atol=1e-3)
    assert np.log(factors).mean() == pytest.approx(0, abs=1e-6)


def test_outliers_that_the_next_weights_undo_are_undone_exactly() -> None:
    """The channel that is 50 times larger gets a factor 50 times larger, and nothing is left of it."""
    inputs, weight = inputs_and_weight()
    planted = np.ones(K, np.float32)
    planted[[3, 17]] = 50
    plain, with_outliers = factors_for(inputs, weight), factors_for(inputs * planted, weight / planted[:, None])
    ratio = with_outliers / plain / planted
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


def test_the_error_falls_where_inputs_are_uneven() -> None:
    inputs, weight = inputs_and_weight()
    inputs[:, :2] *= 30
    weight[:2] /= 10
    factors = factors_for(inputs, weight)
    assert int8_error(inputs / factors, weight * factors[:, None]) <= 0.25 * int8_error(inputs, weight)


@pytest.mark.parametrize("seed", range(5))
def test_the_error_never_grows_much(seed: int) -> None:
    """The noise is estimated, so a little may be lost where nothing is to be had."""
    inputs, weight = inputs_and_weight(seed)
    factors = factors_for(inputs, weight)
    assert int8_error(inputs / factors, weight * factors[:, None]) <= 1.1 * int8_error(inputs, weight)


@pytest.mark.parametrize("group", [1, 5, 16, K])
def test_dead_channels_and_zero_rows_get_finite_factors(group: int) -> None:
    inputs, weight = inputs_and_weight()
    inputs[:, 5], weight[9] = 0, 0
    inputs[:, 11], weight[11] = 0, 0
    factors = smoothing_factors(inputs, weight, highest=8, group=group)
    assert np.isfinite(factors).all()
    assert (factors > 0).all()
    zeros = smoothing_factors(np.zeros_like(inputs), np.zeros_like(weight), highest=8, group=group)
    assert (zeros == 1).all()


# The evening: factors, and a centre


def evening_of(inputs: Float32Array, weight: Float32Array) -> Evening:
    return even_out(inputs, weight, highest=INT8_MAX, group=len(weight))


def test_matrix_and_bias_make_up_for_what_the_inputs_lose() -> None:
    inputs, weight = inputs_and_weight()
    inputs[:, :3] = 40 * inputs[:, :3] + 100
    bias = weight[0]
    even = evening_of(inputs, weight)
    product = even.of_inputs(inputs) @ even.of_matrix(weight) + even.of_bias(bias, weight)
    np.testing.assert_allclose(product, inputs @ weight + bias, rtol=0, atol=2e-3)


def test_means_cost_no_steps() -> None:
    """Channels that differ in their means only are as even as if they had none."""
    inputs, weight = inputs_and_weight()
    apart = inputs + 100 * np.arange(K, dtype=np.float32)
    plain, even = evening_of(inputs, weight), evening_of(apart, weight)
    np.testing.assert_allclose(even.factors, plain.factors, rtol=1e-3)
    np.testing.assert_allclose(even.of_inputs(apart), plain.of_inputs(inputs), rtol=0, atol=1e-2)


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_a_few_channels_that_make_every_peak_are_found(count: int) -> None:
    inputs, _ = inputs_and_weight()
    planted = np.random.default_rng(1).choice(K, count, replace=False)
    inputs[:, planted] += 100
    found = find_outliers(inputs)
    assert set(planted) <= set(found.tolist())
    assert len(found) == next(size for size in OUTLIERS if size >= count)


@pytest.mark.parametrize("n_channels", [1, 4, 5, K])
def test_ordinary_inputs_have_no_outliers(n_channels: int) -> None:
    inputs, _ = inputs_and_weight()
    assert not len(find_outliers(inputs[:, :n_channels]))
    assert not len(find_outliers(np.zeros((T, n_channels), np.float32)))
