"""The int8 recipe: facts, laws over many matrices, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from quantization.blocks import Blocks
from quantization.grid import SMALLEST_PEAK
from quantization.int8 import (
    ELEMENTS_PER_STEP,
    INT8_MAX,
    ZERO_POINT,
    Int8Columns,
    quantize_blocks,
    quantize_columns,
)
from runtime.errors import QuantizationError

HALF_A_STEP = 0.5 + 2e-5
"""Largest round trip error in steps: float32 rounding of 127 steps goes on top of the half. Measured: 0.500009."""

Float32Array = NDArray[np.float32]


MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=20),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def dequantized_columns(columns: Int8Columns) -> NDArray[np.float64]:
    return columns.values.astype(np.float64) * columns.scale


def dequantized_blocks(blocks: Blocks, n_columns: int) -> NDArray[np.float64]:
    steps = blocks.values.astype(np.float64) - ZERO_POINT
    result: NDArray[np.float64] = (steps * blocks.scale[:, :, None]).reshape(len(steps), -1)[:, :n_columns]
    return result


# Facts


def test_columns_of_a_known_matrix() -> None:
    weight = np.array([[127, 0, 1], [-63.5, 0, -2], [0.4, 0, 0.01]], np.float32)
    columns = quantize_columns(weight)
    assert columns.values.tolist() == [[127, 0, 64], [-64, 0, -127], [0, 0, 1]]  # ties go to the even number
    assert columns.scale.tolist() == [1, 1, np.float32(2) / np.float32(127)]
    assert [array.dtype.name for array in (columns.values, columns.scale)] == ["int8", "float32"]


def test_blocks_of_a_known_matrix() -> None:
    weight = np.array([[127, -63.5, 0, 0, 254], [0, 0, -127, 1, 0]], np.float32)
    blocks = quantize_blocks(weight, 2)
    assert blocks.values.tolist() == [[[255, 64], [128, 128], [255, 128]], [[128, 128], [1, 129], [128, 128]]]
    assert blocks.scale.tolist() == [[1, 1, 2], [1, 1, 1]]
    assert [array.dtype.name for array in (blocks.values, blocks.scale)] == ["uint8", "float32"]


# Laws


@given(MATRICES)
@settings(max_examples=200, deadline=None)
def test_a_column_comes_back_within_half_a_step(weight: Float32Array) -> None:
    columns = quantize_columns(weight)
    steps_off = np.abs(dequantized_columns(columns) - weight) / columns.scale
    assert steps_off.max() <= HALF_A_STEP
    assert np.abs(columns.values.astype(int)).max() <= INT8_MAX


@given(MATRICES, st.integers(1, 24))
@settings(max_examples=200, deadline=None)
def test_a_block_comes_back_within_half_a_step(weight: Float32Array, block_size: int) -> None:
    blocks = quantize_blocks(weight, block_size)
    scale = np.repeat(blocks.scale, block_size, axis=1)[:, : weight.shape[1]]
    assert (np.abs(dequantized_blocks(blocks, weight.shape[1]) - weight) / scale).max() <= HALF_A_STEP
    assert blocks.values.min() >= ZERO_POINT - INT8_MAX
    assert blocks.values.shape == (len(weight), -(-weight.shape[1] // block_size), block_size)


@given(MATRICES)
@settings(deadline=None)
def test_a_column_uses_all_127_steps(weight: Float32Array) -> None:
    peak = np.abs(quantize_columns(weight).values.astype(int)).max(axis=0)
    assert (peak == np.where(np.abs(weight).max(axis=0) > SMALLEST_PEAK, INT8_MAX, 0)).all()


@given(MATRICES)
@settings(deadline=None)
def test_negated_weights_give_negated_values(weight: Float32Array) -> None:
    positive, negative = quantize_columns(weight), quantize_columns(-weight)
    np.testing.assert_array_equal(negative.values, -positive.values)
    np.testing.assert_array_equal(negative.scale, positive.scale)
    blocks, negative_blocks = quantize_blocks(weight, 16), quantize_blocks(-weight, 16)
    np.testing.assert_array_equal(negative_blocks.values.astype(int), 2 * ZERO_POINT - blocks.values.astype(int))
    np.testing.assert_array_equal(negative_blocks.scale, blocks.scale)


def test_zero_columns_and_blocks_get_scale_1() -> None:
    zeros = np.zeros((3, 32), np.float32)
    columns, blocks = quantize_columns(zeros), quantize_blocks(zeros, 16)
    assert not columns.values.any()
    assert (columns.scale == 1).all()
    assert (blocks.values == ZERO_POINT).all()
    assert (blocks.scale == 1).all()


def test_a_tail_that_fills_no_block_is_padded_with_zeros() -> None:
    blocks = quantize_blocks(np.ones((2, 24), np.float32), 16)
    assert blocks.values[:, 1].tolist() == [[255] * 8 + [ZERO_POINT] * 8] * 2


def test_work_in_steps_equals_the_formula_on_the_whole() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((ELEMENTS_PER_STEP // 512 + 3, 512), dtype=np.float32)
    columns, blocks = quantize_columns(weight), quantize_blocks(weight, 64)
    scale = np.abs(weight).max(axis=0) / np.float32(127)
    np.testing.assert_array_equal(columns.scale, scale)
    np.testing.assert_array_equal(columns.values, np.rint(weight * (1 / scale)))
    cut = weight.reshape(len(weight), 8, 64)
    block_scale = np.abs(cut).max(axis=2) / np.float32(127)
    np.testing.assert_array_equal(blocks.scale, block_scale)
    np.testing.assert_array_equal(blocks.values, np.rint(cut / block_scale[:, :, None]) + 128)


# Refusals


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_column_that_is_not_finite_is_refused(value: float) -> None:
    weight = np.ones((4, 5), np.float32)
    weight[2, 3] = value
    with pytest.raises(QuantizationError, match=r"^a weight is not finite in column 3; the checkpoint is damaged$"):
        quantize_columns(weight)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_block_that_is_not_finite_is_refused_by_its_own_row(value: float) -> None:
    weight = np.ones((ELEMENTS_PER_STEP // 512 + 10, 512), np.float32)
    row = len(weight) - 2  # beyond the first step
    weight[row, 70] = value
    with pytest.raises(QuantizationError, match=rf"^a weight is not finite in row {row}, block 1; the checkpoint"):
        quantize_blocks(weight, 64)


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    weight = np.ones(shape, np.float32)
    with pytest.raises(QuantizationError, match=r"a weight to quantize has shape \(.*\), expected \[in, out\]"):
        quantize_columns(weight)
    with pytest.raises(QuantizationError, match=r"a weight to quantize has shape \(.*\), expected \[rows, columns\]"):
        quantize_blocks(weight, 16)
