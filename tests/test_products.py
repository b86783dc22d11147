"""How a matrix is stored and multiplied by at each precision: each product alone, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from export.graph import IR_VERSION, OPSET
from export.onnx_builder import GraphBuilder, WeightsFile
from export.products import PRODUCTS
from quantization.blocks import Blocks
from quantization.int8 import INT8_MAX, ZERO_POINT, quantize_blocks, quantize_columns
from quantization.recipes import SplitMatrix, Tensor, TokenTable, quantize_matrix, quantize_table, table_block_size
from runtime.package import Precision
from runtime.session import open_session
from tests.test_quantization_int4 import dequantized

FLOAT32_PRODUCT = 1e-6
"""Error of a float32 product of 96 terms, as a share of the largest result. Measured: 3e-7."""

INT8_PRODUCT = 5e-7
"""Between the graph's int8 product and the same in exact integers and float64, as a share of the largest result: only
scales are rounded. Measured: 7e-8."""

INT4_INPUTS = 0.02
"""Of the 8 bits of the inputs, as a share of the largest result. Measured: 0.007."""

INT8_HEAD = 0.03
"""Error of the int8 head on random numbers, as a share of the largest logit, of 8 bits twice. Measured: 0.012."""

K, N = 96, 40

Float32Array = NDArray[np.float32]
Run = Callable[..., NDArray[np.float32]]


def run_graph(folder: Path, build: Callable[[GraphBuilder], None]) -> Run:
    """A session over a graph with one output y, which takes x, the only input."""
    with (folder / "model.onnx_data").open("wb") as file:
        builder = GraphBuilder(WeightsFile(file, "model.onnx_data"))
        build(builder)
    model = builder.model(name="product", opset=OPSET, ir_version=IR_VERSION, producer="test")
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    session = open_session(folder / "model.onnx").session

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = session.run(["y"], {"x": x})[0]
        return result

    return run


def linear(folder: Path, precision: Precision, weight: Tensor, shape: tuple[int, int] = (K, N)) -> Run:
    def build(graph: GraphBuilder) -> None:
        x = graph.input("x", TensorProto.FLOAT, ["B", "S", shape[0]])
        y = PRODUCTS[precision].linear(graph, "w", x, weight)
        graph.output(graph.node("Identity", [y], "y"), TensorProto.FLOAT, ["B", "S", shape[1]])

    return run_graph(folder, build)


def embedding(folder: Path, precision: Precision, table: Tensor, n_columns: int = K) -> Run:
    def build(graph: GraphBuilder) -> None:
        ids = graph.input("x", TensorProto.INT64, ["B", "S"])
        rows = PRODUCTS[precision].token_table(graph, "wte.weight", table).embed(graph, ids)
        graph.output(graph.node("Identity", [rows], "y"), TensorProto.FLOAT, ["B", "S", n_columns])

    return run_graph(folder, build)


def head(folder: Path, precision: Precision, table: Tensor, shape: tuple[int, int] = (N, K)) -> Run:
    def build(graph: GraphBuilder) -> None:
        x = graph.input("x", TensorProto.FLOAT, ["B", "S", shape[1]])
        PRODUCTS[precision].token_table(graph, "wte.weight", table).logits(graph, x, "y")
        graph.output("y", TensorProto.FLOAT, ["B", "S", shape[0]])

    return run_graph(folder, build)


def random(*shape: int, seed: int = 0) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def share_of_largest(actual: NDArray[np.float32], expected: NDArray[np.float64]) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# fp32


def test_fp32_products_are_those_of_the_weights(tmp_path: Path) -> None:
    weight, x = random(K, N), random(2, 3, K, seed=1)
    expected = x.astype(np.float64) @ weight
    assert share_of_largest(linear(tmp_path, "fp32", weight)(x), expected) <= FLOAT32_PRODUCT
    assert share_of_largest(head(tmp_path, "fp32", np.ascontiguousarray(weight.T))(x), expected) <= FLOAT32_PRODUCT


def test_fp32_embedding_picks_rows(tmp_path: Path) -> None:
    table, ids = random(N, K), np.array([[0, 39, 7], [7, 7, 1]])
    np.testing.assert_array_equal(embedding(tmp_path, "fp32", table)(ids), table[ids])


# int8: the four matrices of a block


def test_int8_product_is_integer_arithmetic(tmp_path: Path) -> None:
    """max|x| of a row, 127 steps of it, whole numbers multiplied, and the scales put back."""
    weight, x = random(K, N), 10 * random(2, 3, K, seed=1)
    columns = quantize_columns(weight)
    peak = np.abs(x).max(axis=-1, keepdims=True)
    steps = np.rint(x / peak / np.float32(1 / INT8_MAX)).astype(np.int64)
    expected = (steps @ columns.values.astype(np.int64)) * (peak.astype(np.float64) / INT8_MAX) * columns.scale
    assert share_of_largest(linear(tmp_path, "int8", weight)(x), expected) <= INT8_PRODUCT


def test_int8_product_of_a_zero_row_is_zero(tmp_path: Path) -> None:
    x = random(1, 4, K, seed=2)
    x[0, 1] = 0
    y = linear(tmp_path, "int8", random(K, N))(x)
    assert not y[0, 1].any()
    assert np.isfinite(y).all()


@pytest.mark.parametrize("factor", [1e-37, 1e-30, 1e30])
def test_int8_product_scales_with_its_row(tmp_path: Path, factor: float) -> None:
    run, x = linear(tmp_path, "int8", random(K, N)), random(1, 2, K, seed=3)
    assert share_of_largest(run(x * np.float32(factor)), run(x) * np.float64(np.float32(factor))) <= INT8_PRODUCT


def test_int8_row_does_not_depend_on_the_rows_beside_it(tmp_path: Path) -> None:
    """What a scale for the whole batch would break: rows a million times larger stand beside it."""
    run, x = linear(tmp_path, "int8", random(K, N)), random(4, 7, K, seed=4)
    x[1::2] *= np.float32(1e6)
    together = run(x)
    for row in range(4):
        np.testing.assert_array_equal(run(x[row : row + 1]), together[row : row + 1])
        for token in range(7):
            np.testing.assert_array_equal(run(x[row, token][None, None])[0, 0], together[row, token])


# int8: the embedding and the head


@pytest.mark.parametrize("n_columns", [8, 16, 24, 32, 40, 48, 64, 96])
def test_int8_embedding_is_the_dequantized_row_exactly(tmp_path: Path, n_columns: int) -> None:
    table, ids = random(N, n_columns), np.array([[0, 39, 7], [7, 7, 1]])
    blocks = quantize_blocks(table, table_block_size(n_columns, "int8"))
    rows = ((blocks.values.astype(np.float32) - ZERO_POINT) * blocks.scale[:, :, None]).reshape(N, -1)[:, :n_columns]
    np.testing.assert_array_equal(embedding(tmp_path, "int8", table, n_columns)(ids), rows[ids])


@pytest.mark.parametrize("n_columns", [8, 24, 32, 48, 96])
@pytest.mark.parametrize("n_rows", [1, 7, 131])
def test_int8_head_multiplies_by_the_transpose(tmp_path: Path, n_rows: int, n_columns: int) -> None:
    table, x = random(n_rows, n_columns), random(2, 3, n_columns, seed=5)
    expected = x.astype(np.float64) @ table.T
    assert share_of_largest(head(tmp_path, "int8", table, table.shape)(x), expected) <= INT8_HEAD


def test_int8_head_of_a_zero_row_is_zero(tmp_path: Path) -> None:
    x = random(1, 3, K, seed=6)
    x[0, 1] = 0
    y = head(tmp_path, "int8", random(N, K))(x)
    assert not y[0, 1].any()
    assert np.isfinite(y).all()


# int8: what calibration adds


def test_int8_product_of_one_sided_inputs_has_223_steps_above_zero(tmp_path: Path) -> None:
    weight, least = random(K, N), -0.17
    x = np.maximum(3 * random(2, 3, K, seed=1), np.float32(least))
    columns = replace(quantize_columns(weight), least_input=least)
    step = np.maximum(x.max(axis=-1, keepdims=True), np.float32(-least * 223 / 32)) / 223
    steps = np.rint(x / step).astype(np.int64)
    assert steps.min() >= -32
    expected = (steps @ columns.values.astype(np.int64)) * step.astype(np.float64) * columns.scale
    actual = linear(tmp_path, "int8", columns)(x)
    assert share_of_largest(actual, expected) <= INT8_PRODUCT
    plain = linear(tmp_path, "int8", weight)(x)
    exact = x.astype(np.float64) @ (columns.values * columns.scale.astype(np.float64))
    assert np.square(actual - exact).mean() < 0.5 * np.square(plain - exact).mean()


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("n_kept", [1, 4, 16])
def test_rows_that_are_kept_see_their_inputs_as_they_are(tmp_path: Path, precision: Precision, n_kept: int) -> None:
    """And the others see nothing of them: outliers leave no trace in the scale."""
    weight, x = random(K, N), random(2, 3, K, seed=1)
    x[..., -n_kept:] += 1000
    common, kept = weight[:-n_kept], weight[-n_kept:]
    assert precision != "fp32"
    split = SplitMatrix(quantize_matrix(common, precision), kept)
    alone = linear(tmp_path, precision, split.quantized, (K - n_kept, N))(x[..., :-n_kept])
    expected = alone + x[..., -n_kept:].astype(np.float64) @ kept
    assert share_of_largest(linear(tmp_path, precision, split)(x), expected) <= FLOAT32_PRODUCT


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_embedding_takes_back_the_head_s_column_scale(tmp_path: Path, precision: Precision) -> None:
    table, scale, ids = random(N, K), np.exp(random(K, seed=1)), np.array([[0, 39, 7], [7, 7, 1]])
    assert precision != "fp32"
    blocks = quantize_table(table, precision)
    plain = embedding(tmp_path, precision, TokenTable(blocks))(ids)
    np.testing.assert_array_equal(embedding(tmp_path, precision, TokenTable(blocks, scale))(ids), plain * scale)


# int4


@pytest.mark.parametrize("n_rows", [8, 32, 96, 128, 200, 320])
def test_int4_product_is_that_of_the_dequantized_blocks(tmp_path: Path, n_rows: int) -> None:
    weight, x = random(n_rows, N), random(2, 3, n_rows, seed=1)
    blocks = quantize_matrix(weight, "int4")
    assert isinstance(blocks, Blocks)
    expected = x.astype(np.float64) @ dequantized(blocks).T
    assert share_of_largest(linear(tmp_path, "int4", weight, weight.shape)(x), expected) <= INT4_INPUTS


def test_int4_row_hardly_depends_on_the_rows_beside_it(tmp_path: Path) -> None:
    """MatMulNBits sums in another order for a row that stands alone; no input's rounding depends on it."""
    run, x = linear(tmp_path, "int4", random(K, N)), random(4, 7, K, seed=4)
    x[1::2] *= np.float32(1e6)
    together = run(x)
    for row in range(4):
        alone = run(x[row : row + 1])
        assert share_of_largest(alone, together[row : row + 1].astype(np.float64)) <= FLOAT32_PRODUCT


@pytest.mark.parametrize("n_columns", [8, 16, 24, 32, 40, 96, 128])
def test_int4_embedding_is_the_dequantized_row_exactly(tmp_path: Path, n_columns: int) -> None:
    table, ids = random(N, n_columns), np.array([[0, 39, 7], [7, 7, 1]])
    rows = dequantized(quantize_table(table, "int4"))
    np.testing.assert_array_equal(embedding(tmp_path, "int4", table, n_columns)(ids), rows[ids])


@pytest.mark.parametrize("n_columns", [8, 24, 32, 96])
@pytest.mark.parametrize("n_rows", [1, 7, 131])
def test_int4_head_multiplies_by_the_transpose(tmp_path: Path, n_rows: int, n_columns: int) -> None:
    table, x = random(n_rows, n_columns), random(2, 3, n_columns, seed=5)
    expected = x.astype(np.float64) @ dequantized(quantize_table(table, "int4")).T
    assert share_of_largest(head(tmp_path, "int4", table, table.shape)(x), expected) <= INT8_HEAD
