"""Rounding that looks ahead: what it keeps, and that it never loses against plain rounding."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from quantization import gptq
from quantization.gptq import round_compensated
from quantization.grid import Grid, searched_grid, symmetric_grid
from runtime.errors import QuantizationError

Float32Array = NDArray[np.float32]

GAIN = 0.5
"""Of the products' squared error, what is left of plain rounding's for inputs so correlated. Measured: 0.26."""


def plainly(weight: Float32Array, grid: Grid) -> Float32Array:
    return np.stack([grid.nearest(row, values) for row, values in enumerate(weight)])


def correlated_inputs(n_rows: int, n_columns: int, seed: int) -> Float32Array:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n_rows, n_columns)) @ rng.standard_normal((n_columns, n_columns))
    return (mixed * np.exp(rng.standard_normal(n_columns))).astype(np.float32)


def product_error(inputs: Float32Array, weight: Float32Array, rounded: Float32Array) -> float:
    return float(np.square(inputs.astype(np.float64) @ (rounded - weight)).sum())


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("bits", [4, 8])
def test_products_are_closer_than_by_plain_rounding(seed: int, bits: int) -> None:
    rng = np.random.default_rng(100 + seed)
    n_rows, n_columns = int(rng.integers(2, 150)), int(rng.integers(1, 60))
    weight, inputs = rng.standard_normal((n_rows, n_columns), dtype=np.float32), correlated_inputs(600, n_rows, seed)
    importance = np.ones(n_rows, np.float32)
    grid = (
        searched_grid(weight, bits=4, group=32, importance=importance)
        if bits == 4
        else symmetric_grid(weight, highest=127, group=n_rows)
    )
    rounded = round_compensated(weight, inputs.T @ inputs, grid)
    assert product_error(inputs, weight, rounded) <= product_error(inputs, weight, plainly(weight, grid))


def test_much_of_the_error_goes_where_inputs_are_correlated() -> None:
    weight, inputs = np.random.default_rng(0).standard_normal((96, 64), dtype=np.float32), correlated_inputs(500, 96, 1)
    grid = symmetric_grid(weight, highest=7, group=96)
    rounded = round_compensated(weight, inputs.T @ inputs, grid)
    plain = product_error(inputs, weight, plainly(weight, grid))
    assert product_error(inputs, weight, rounded) <= GAIN * plain


def test_inputs_that_are_not_correlated_leave_plain_rounding() -> None:
    weight = np.random.default_rng(0).standard_normal((70, 33), dtype=np.float32)
    grid = symmetric_grid(weight, highest=127, group=70)
    hessian = np.diag(np.arange(1, 71, dtype=np.float32))
    np.testing.assert_array_equal(round_compensated(weight, hessian, grid), plainly(weight, grid))


def test_the_result_lies_on_the_grid() -> None:
    weight, inputs = np.random.default_rng(0).standard_normal((70, 33), dtype=np.float32), correlated_inputs(200, 70, 0)
    grid = searched_grid(weight, bits=4, group=32, importance=np.ones(70, np.float32))
    rounded = round_compensated(weight, inputs.T @ inputs, grid)
    np.testing.assert_array_equal(grid.codes(rounded) * np.repeat(grid.scale, 32, axis=0)[:70], rounded)


def test_a_multiple_of_the_inputs_squares_changes_nothing() -> None:
    weight, inputs = np.random.default_rng(0).standard_normal((70, 33), dtype=np.float32), correlated_inputs(200, 70, 0)
    grid = symmetric_grid(weight, highest=7, group=70)
    hessian = inputs.T @ inputs
    np.testing.assert_array_equal(
        round_compensated(weight, hessian, grid), round_compensated(weight, hessian * np.float32(1024), grid)
    )


def test_columns_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """So they may be taken in any portions."""
    weight, inputs = np.random.default_rng(0).standard_normal((40, 50), dtype=np.float32), correlated_inputs(90, 40, 0)
    grid = symmetric_grid(weight, highest=7, group=40)
    whole = round_compensated(weight, inputs.T @ inputs, grid)
    monkeypatch.setattr(gptq, "COLUMNS_PER_STEP", 16)
    portions = round_compensated(weight, inputs.T @ inputs, grid)
    assert (whole == portions).mean() >= 0.99  # a product of another shape may round a tie the other way


@pytest.mark.parametrize("n_inputs", [0, 1, 5])
def test_fewer_inputs_than_rows_will_do(n_inputs: int) -> None:
    weight, inputs = np.random.default_rng(0).standard_normal((40, 8), dtype=np.float32), correlated_inputs(5, 40, 0)
    inputs = inputs[:n_inputs]
    grid = symmetric_grid(weight, highest=7, group=40)
    rounded = round_compensated(weight, inputs.T @ inputs, grid)
    assert np.isfinite(rounded).all()
    assert product_error(inputs, weight, rounded) <= product_error(inputs, weight, plainly(weight, grid)) + 1e-12


def test_a_sum_of_squares_that_rounding_left_indefinite_is_damped() -> None:
    weight = np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32)
    hessian = np.ones((3, 3), np.float32)
    hessian[0, 1] = hessian[1, 0] = 1.1
    assert np.isfinite(round_compensated(weight, hessian, symmetric_grid(weight, highest=7, group=3))).all()


def test_inputs_that_are_not_finite_are_refused() -> None:
    weight, hessian = np.ones((3, 4), np.float32), np.eye(3, dtype=np.float32)
    hessian[1, 1] = np.nan
    with pytest.raises(
        QuantizationError, match=r"^a matrix is given inputs that are not finite; the checkpoint is dam"
    ):
        round_compensated(weight, hessian, symmetric_grid(weight, highest=7, group=3))
