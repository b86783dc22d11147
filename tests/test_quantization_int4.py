"""The recipes of each precision: sizes, packing, and what calibration changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantization import recipes
from quantization.blocks import Blocks, blocks_of_grid
from quantization.grid import searched_grid
from quantization.int8 import Int8Columns
from quantization.recipes import (
    Quantized,
    SplitMatrix,
    TokenTable,
    matrix_group,
    quantize_matrix,
    quantize_table,
    table_block_size,
)
from runtime.errors import QuantizationError
from tests.test_gptq import correlated_inputs, product_error

Float32Array = NDArray[np.float32]

FITTED = 0.99
"""Of the products' squared error, what is left once scales are fitted to the codes. Measured: 0.978."""


def dequantized(blocks: Blocks) -> Float32Array:
    """[N, K] of either number of bits."""
    codes = blocks.values.astype(np.int16)
    if blocks.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
    steps = (codes - 2 ** (blocks.bits - 1)).astype(np.float32) * blocks.scale[:, :, None]
    return steps.reshape(len(codes), -1)[:, : blocks.n_columns]


def random(*shape: int, seed: int = 0) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_two_codes_share_a_byte_the_first_in_its_lower_half() -> None:
    weight = np.array([[-8, 7, 0, 1, 2]], np.float32).T  # [K, N] of one column
    blocks = quantize_matrix(np.tile(weight, (1, 2)), "int4")
    assert isinstance(blocks, Blocks)
    assert blocks.values.shape == (2, 1, 8)  # a block of 16 codes
    assert blocks.values[0, 0].tolist() == [0xF0, 0x98, 0x8A, *[0x88] * 5]
    assert blocks.scale.tolist() == [[1], [1]]
    np.testing.assert_array_equal(dequantized(blocks), np.tile(weight.T, (2, 1)))


@given(st.integers(1, 70), st.integers(1, 5), st.sampled_from([16, 32, 64]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_codes_round_trip_through_their_bytes(n_rows: int, n_columns: int, size: int, seed: int) -> None:
    weight = random(n_rows, n_columns, seed=seed)
    grid = searched_grid(weight, bits=4, group=size, importance=np.ones(n_rows, np.float32))
    on_grid = grid.codes(weight) * np.repeat(grid.scale, size, axis=0)[:n_rows]
    np.testing.assert_array_equal(dequantized(blocks_of_grid(on_grid, grid, bits=4)), on_grid.T)


@pytest.mark.parametrize(
    ("n_rows", "size"),
    [(768, 256), (5120, 256), (1600, 128), (6400, 256), (127, 128), (112, 16), (96, 32), (33, 16), (16, 16), (1, 16)],
)
def test_int4_blocks_are_as_long_as_the_matrix_fills(n_rows: int, size: int) -> None:
    assert matrix_group(n_rows, "int4") == size
    assert matrix_group(n_rows, "int8") == n_rows


@pytest.mark.parametrize(("n_columns", "int8", "int4"), [(1600, 64, 32), (96, 32, 32), (24, 16, 16), (8, 16, 16)])
def test_blocks_of_a_table(n_columns: int, int8: int, int4: int) -> None:
    assert table_block_size(n_columns, "int8") == int8
    assert table_block_size(n_columns, "int4") == int4


def test_a_matrix_takes_four_and_an_eighth_bits() -> None:
    blocks = quantize_matrix(random(256, 100), "int4")
    assert isinstance(blocks, Blocks)
    assert 8 * (blocks.values.nbytes + blocks.scale.nbytes) / (256 * 100) == 4.125
    table = quantize_table(random(100, 256), "int4")
    assert 8 * (table.values.nbytes + table.scale.nbytes) / (256 * 100) == 5


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_inputs_bring_the_products_closer(precision: str) -> None:
    weight = random(128, 40)
    inputs = random(500, 128, seed=1) @ (random(128, 128, seed=2) * np.float32(0.3) + np.eye(128, dtype=np.float32))
    for quantize, matrix in ((quantize_matrix, weight), (quantize_table, np.ascontiguousarray(weight.T))):
        errors = []
        for hessian in (None, inputs.T @ inputs):
            result = quantize(matrix, precision, hessian)  # type: ignore[operator]
            restored = result.values * result.scale if isinstance(result, Int8Columns) else dequantized(result).T
            errors.append(np.square(inputs @ (restored - weight)).sum())
        assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_table_that_is_not_finite_is_refused_by_its_row(precision: str, calibrated: bool) -> None:
    table = random(9, 64)
    table[7, 3] = np.inf
    hessian = np.eye(64, dtype=np.float32) if calibrated else None
    with pytest.raises(QuantizationError, match=r"^a weight is not finite in row 7"):
        quantize_table(table, precision, hessian)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 8])
def test_what_codes_stand_for_is_told_of_each_kind_of_tensor(bits: int) -> None:
    weight, kept, factors = random(70, 33), random(3, 33, seed=1), np.abs(random(70, seed=2)) + 1
    precision: Quantized = "int4" if bits == 4 else "int8-weights"
    blocks, columns = quantize_matrix(weight, precision), quantize_matrix(weight, "int8")
    assert isinstance(blocks, Blocks)
    assert isinstance(columns, Int8Columns)
    expected = dequantized(blocks).T
    np.testing.assert_array_equal(recipes.dequantized(blocks), expected)
    np.testing.assert_array_equal(recipes.dequantized(SplitMatrix(blocks, kept)), np.concatenate([expected, kept]))
    np.testing.assert_array_equal(recipes.dequantized(TokenTable(blocks)), expected.T)
    np.testing.assert_array_equal(recipes.dequantized(TokenTable(blocks, factors)), expected.T * factors)
    np.testing.assert_array_equal(recipes.dequantized(columns), columns.values * columns.scale)
    np.testing.assert_array_equal(recipes.dequantized(kept), kept)


def test_scales_are_fitted_to_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = random(256, 64), correlated_inputs(600, 256, 0)

    def error() -> float:
        blocks = quantize_matrix(weight, "int4", inputs.T @ inputs)
        return product_error(inputs, weight, recipes.dequantized(blocks))

    fitted = error()
    monkeypatch.setattr(recipes, "refitted", lambda grid, *_args, **_options: grid)
    assert fitted <= FITTED * error()
