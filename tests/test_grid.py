"""Grids of codes: facts, laws over many matrices, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from quantization.grid import Grid, searched_grid, symmetric_grid
from runtime.errors import QuantizationError

HALF_A_STEP = 0.5 + 2e-5
"""Largest error in steps: float32 rounding goes on top of the half. Measured: 0.500009."""

Float32Array = NDArray[np.float32]

MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=20),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
)


def rounded(weight: Float32Array, grid: Grid) -> Float32Array:
    return np.stack([grid.nearest(row, values) for row, values in enumerate(weight)])


def searched(weight: Float32Array, group: int) -> Grid:
    return searched_grid(weight, bits=4, group=group, importance=np.ones(len(weight), np.float32))


def test_a_symmetric_grid_gives_the_largest_weight_the_highest_code() -> None:
    weight = np.array([[1, 0], [-2, 0], [0.5, 3], [4, 0]], np.float32)
    grid = symmetric_grid(weight, highest=4, group=2)
    assert grid.scale.tolist() == [[0.5, 1], [1, 0.75]]
    assert grid.codes(weight).tolist() == [[2, 0], [-4, 0], [0, 4], [4, 0]]  # a tie goes to the even code


def test_a_searched_grid_gives_the_largest_weight_the_lowest_code() -> None:
    """-8 has no +8 beside it, so the scale takes the sign that needs it."""
    weight = np.array([[8], [-7], [3], [1]], np.float32)
    grid = searched(weight, 4)
    assert grid.scale.tolist() == [[-1]]
    assert grid.codes(weight).tolist() == [[-8], [7], [-3], [-1]]


def test_a_range_is_cut_where_that_serves_the_others() -> None:
    weight = np.concatenate([[1.0], np.full(127, 0.0625 * 0.9)]).astype(np.float32)[:, None]
    whole = Grid(np.array([[-0.125]], np.float32), -8, 7, 128)
    errors = [np.square(rounded(weight, grid) - weight).sum() for grid in (whole, searched(weight, 128))]
    assert errors[1] < errors[0]


def test_importance_says_whose_error_counts() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 40), dtype=np.float32)
    importance = np.where(np.arange(64) < 8, 1000, 1).astype(np.float32)
    errors = [
        np.square(rounded(weight, grid) - weight)[:8].sum()
        for grid in (searched_grid(weight, bits=4, group=64, importance=importance), searched(weight, 64))
    ]
    assert errors[0] < errors[1]


@given(MATRICES, st.integers(1, 24))
@settings(max_examples=100, deadline=None)
def test_a_symmetric_grid_is_within_half_a_step(weight: Float32Array, group: int) -> None:
    grid = symmetric_grid(weight, highest=127, group=group)
    scale = np.repeat(grid.scale, group, axis=0)[: len(weight)]
    assert (np.abs(rounded(weight, grid) - weight) / np.abs(scale)).max() <= HALF_A_STEP


@given(MATRICES, st.integers(1, 24), st.booleans())
@settings(max_examples=100, deadline=None)
def test_codes_come_back_exactly(weight: Float32Array, group: int, search: bool) -> None:
    grid = searched(weight, group) if search else symmetric_grid(weight, highest=127, group=group)
    on_grid = rounded(weight, grid)
    codes = grid.codes(on_grid)
    scale = np.repeat(grid.scale, group, axis=0)[: len(weight)]
    np.testing.assert_array_equal(codes * scale, on_grid)
    np.testing.assert_array_equal(codes, grid.codes(weight))
    assert grid.lowest <= codes.min() <= codes.max() <= grid.highest


def test_zeros_get_scale_1() -> None:
    zeros = np.zeros((5, 3), np.float32)
    for grid in (symmetric_grid(zeros, highest=127, group=2), searched(zeros, 2)):
        assert (np.abs(grid.scale) == 1).all() or not rounded(zeros, grid).any()
        assert not grid.codes(zeros).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weight = np.ones((4, 5), np.float32)
    weight[2, 3] = value
    for make in (lambda: symmetric_grid(weight, highest=127, group=4), lambda: searched(weight, 4)):
        with pytest.raises(QuantizationError, match=r"^a weight is not finite in column 3; the checkpoint is damaged$"):
            make()


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"a weight to quantize has shape \(3,\), expected \[in, out\]"):
        symmetric_grid(np.ones(3, np.float32), highest=127, group=3)
