"""How a matrix stands in the graph and is multiplied by, in each form that it may have; the rest knows no precision.

A linear is one of the four matrices of a block; a `TokenTable` is the [V, D] matrix that is the embedding and, in a
tied model, the head too: it is stored once, the embedding picks its rows and the head multiplies by its transpose.
What is still float32 where the package is not is quantized plainly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias

import numpy as np
from onnx import TensorProto

from quantization.blocks import Blocks
from quantization.int8 import Int8Columns
from quantization.recipes import Quantized, SplitMatrix, Tensor, TokenTable, quantize_matrix, quantize_table
from runtime.activations import ONE_SIDED_STEP, ONE_SIDED_ZERO, STEP, WIDE, ZERO
from runtime.package import Precision

from .checkpoint_files import Float32Array
from .onnx_builder import MICROSOFT, GraphBuilder

Tensors: TypeAlias = "Mapping[str, Tensor]"
"""Canonical name -> float32 array, or what quantization made of it."""

INT8_ACCUMULATION = 4
"""MatMulNBits' accuracy_level: quantize the activations to int8 too. Integer products are the fast ones on a CPU."""


OWN_ACCUMULATION = 0
"""Likewise: multiply in the type of the activations."""


class Table(Protocol):
    def embed(self, graph: GraphBuilder, ids: str) -> str:
        """ids [B, S] -> rows [B, S, D] float32."""

    def logits(self, graph: GraphBuilder, x: str, output: str) -> str:
        """x [B, S, D] -> x @ table.T [B, S, V] float32, named `output`."""


class Products(Protocol):
    def linear(self, graph: GraphBuilder, name: str, x: str, weight: Tensor) -> str:
        """x [B, S, K], weight [K, N] -> x @ weight [B, S, N] float32; `name` is the matrix's canonical name."""

    def token_table(self, graph: GraphBuilder, name: str, table: Tensor) -> Table:
        """Store a [V, D] table."""


class Fp32Table:
    def __init__(self, graph: GraphBuilder, name: str, table: Float32Array) -> None:
        self._name = name
        self._table = graph.weight(name, table)

    def embed(self, graph: GraphBuilder, ids: str) -> str:
        return graph.node("Gather", [self._table, ids], f"{self._name}/rows")

    def logits(self, graph: GraphBuilder, x: str, output: str) -> str:
        return graph.node("FusedMatMul", [x, self._table], output, domain=MICROSOFT, transB=1)


class Fp32Products:
    def linear(self, graph: GraphBuilder, name: str, x: str, weight: Tensor) -> str:
        assert isinstance(weight, np.ndarray), "an fp32 package is given what the checkpoint holds"
        return graph.node("MatMul", [x, graph.weight(name, weight)], f"{name}/product")

    def token_table(self, graph: GraphBuilder, name: str, table: Tensor) -> Table:
        assert isinstance(table, np.ndarray), "an fp32 package is given what the checkpoint holds"
        return Fp32Table(graph, name, table)


class BlockTable:
    """Blocks along D, which MatMulNBits reads as they are; the embedding picks rows of them, and dequantizes those.

    A column scale is the head's concern: its input was multiplied by it where it was made, in the last layer norm. The
    embedding has to multiply by it.
    """

    _scale_dtype: type[np.float32] | type[np.float16] = np.float32  # that of the rows, and of what the head multiplies
    _accuracy_level = INT8_ACCUMULATION

    def __init__(self, graph: GraphBuilder, name: str, table: TokenTable) -> None:
        self._name = name
        self._blocks = table.blocks
        self._values = graph.weight(name, table.blocks.values)  # [V, blocks, bytes] uint8
        self._scale = graph.weight(f"{name}.scale", table.blocks.scale.astype(self._scale_dtype))  # [V, blocks]
        self._column_scale = (
            None if table.column_scale is None else graph.weight(f"{name}.column_scale", table.column_scale)
        )

    def embed(self, graph: GraphBuilder, ids: str) -> str:
        size, n_columns = self._blocks.size, self._blocks.n_columns
        blocks = self._dequantized(graph, ids)
        rows = graph.node("Reshape", [blocks, graph.constant([0, 0, -1], np.int64)], f"{self._name}/rows")
        if n_columns % size:
            bounds = [graph.constant([bound], np.int64) for bound in (0, n_columns, 2)]  # start, end, axis
            rows = graph.node("Slice", [rows, *bounds], f"{self._name}/unpadded")
        if self._column_scale is None:
            return rows
        return graph.node("Mul", [rows, self._column_scale], f"{self._name}/embedded")

    def _dequantized(self, graph: GraphBuilder, ids: str) -> str:
        """ids [B, S] -> (code - 2^(bits - 1)) * scale of their rows, [B, S, blocks, size] float32.

        In ONNX's own operators: GatherBlockQuantized would be one node instead of six or twelve, at the same speed,
        but onnxruntime-web's builds for WebGPU have no processor kernel of it. The scales are picked before they are
        unsqueezed: the other way round, onnxruntime would keep a second copy of them.
        """
        picked = graph.node("Gather", [self._values, ids], f"{self._name}/picked")  # [B, S, blocks, bytes] uint8
        codes = self._unpacked(graph, picked) if self._blocks.bits == 4 else picked
        numbers = graph.node("Cast", [codes], f"{self._name}/numbers", to=TensorProto.FLOAT)
        zero = graph.constant(2 ** (self._blocks.bits - 1), np.float32)
        steps = graph.node("Sub", [numbers, zero], f"{self._name}/steps")  # [B, S, blocks, size]
        scale = graph.node("Gather", [self._scale, ids], f"{self._name}/picked_scale")  # [B, S, blocks]
        scale = graph.node("Unsqueeze", [scale, graph.constant([3], np.int64)], f"{self._name}/block_scale")
        return graph.node("Mul", [steps, scale], f"{self._name}/blocks")

    def _unpacked(self, graph: GraphBuilder, picked: str) -> str:
        """The two codes of each byte, the lower bits first: [B, S, blocks, size / 2] -> [B, S, blocks, size] uint8."""
        low = graph.node("BitwiseAnd", [picked, graph.constant(15, np.uint8)], f"{self._name}/low")
        high = graph.node("BitShift", [picked, graph.constant(4, np.uint8)], f"{self._name}/high", direction="RIGHT")
        axis = graph.constant([4], np.int64)
        pair = [graph.node("Unsqueeze", [half, axis], f"{half}/of_pair") for half in (low, high)]
        pairs = graph.node("Concat", pair, f"{self._name}/pairs", axis=4)  # [B, S, blocks, size / 2, 2]
        return graph.node("Reshape", [pairs, graph.constant([0, 0, 0, -1], np.int64)], f"{self._name}/codes")

    def logits(self, graph: GraphBuilder, x: str, output: str) -> str:
        stored = [self._values, self._scale]
        return block_product(graph, x, self._blocks, stored, output, accuracy_level=self._accuracy_level)


class QuantizedProducts:
    """Matrices in the form that they have, float32 ones by the plain recipe of a precision."""

    def __init__(self, precision: Quantized) -> None:
        self._precision: Quantized = precision

    def linear(self, graph: GraphBuilder, name: str, x: str, weight: Tensor) -> str:
        if isinstance(weight, np.ndarray):
            weight = quantize_matrix(weight, self._precision)
        if isinstance(weight, SplitMatrix):
            return _split_product(graph, name, x, weight)
        assert not isinstance(weight, TokenTable), f"{name} is no table"
        return _quantized_product(graph, name, x, weight)

    def token_table(self, graph: GraphBuilder, name: str, table: Tensor) -> Table:
        if isinstance(table, np.ndarray):
            table = TokenTable(quantize_table(table, self._precision))
        assert isinstance(table, TokenTable), f"{name} is a table"
        return BlockTable(graph, name, table)


PRODUCTS: Mapping[Precision, Products] = {
    "fp32": Fp32Products(),
    "int8": QuantizedProducts("int8"),
    "int4": QuantizedProducts("int4"),
}


def _split_product(graph: GraphBuilder, name: str, x: str, weight: SplitMatrix) -> str:
    """The last inputs by their own rows in float32, and so out of the others' scale."""
    common, outliers = split_inputs(graph, name, x, len(weight.kept))
    kept = graph.weight(f"{name}.kept", weight.kept)
    products = [
        _quantized_product(graph, name, common, weight.quantized),
        graph.node("MatMul", [outliers, kept], f"{name}/outlier_product"),
    ]
    return graph.node("Add", products, f"{name}/whole_product")


def split_inputs(graph: GraphBuilder, name: str, x: str, n_outliers: int) -> tuple[str, str]:
    """All inputs but the last, and the last `n_outliers`."""
    border = graph.constant([-n_outliers], np.int64)
    first, end, last_axis = (graph.constant([value], np.int64) for value in (0, np.iinfo(np.int64).max, -1))
    common = graph.node("Slice", [x, first, border, last_axis], f"{name}/common_inputs")
    outliers = graph.node("Slice", [x, border, end, last_axis], f"{name}/outliers")
    return common, outliers


def _quantized_product(graph: GraphBuilder, name: str, x: str, weight: Int8Columns | Blocks) -> str:
    if isinstance(weight, Int8Columns):
        return _int8_product(graph, name, x, weight)
    stored = [graph.weight(name, weight.values), graph.weight(f"{name}.scale", weight.scale)]
    return block_product(graph, x, weight, stored, f"{name}/product", accuracy_level=INT8_ACCUMULATION)


def block_product(
    graph: GraphBuilder, x: str, weight: Blocks, stored: list[str], output: str, *, accuracy_level: int
) -> str:
    """x @ the blocks whose values and scales are `stored`; the level is MatMulNBits' accuracy_level."""
    return graph.node(
        "MatMulNBits",
        [x, *stored],
        output,
        domain=MICROSOFT,
        bits=weight.bits,
        block_size=weight.size,
        K=weight.n_columns,
        N=len(weight.values),
        accuracy_level=accuracy_level,
    )


def _int8_product(graph: GraphBuilder, name: str, x: str, weight: Int8Columns) -> str:
    """int8 weights per column x uint8 activations per row.

    peak = max|x| of a row, q = rint(127 x / peak) + 128, y = (q - 128) @ w * (w_scale / 127) * peak

    The usual DynamicQuantizeMatMul has one activation scale for the whole [B, S, K]: the same token would get other
    numbers in another batch or another piece of the prompt. A row of zeros needs no guard: 0 / 0 quantizes to some
    integer, which a peak of 0 turns into 0 again.

    Inputs that are never below some -c, as behind an activation, have their zero at 32 instead of 128 and so 223 steps
    above it; the peak is max x, but large enough that 32 steps below zero reach -c. A session may replace these numbers
    by those of 7 bits: `runtime.activations`.
    """
    values = graph.weight(name, weight.values)  # [K, N] int8
    scale = graph.weight(f"{name}.scale", weight.scale)  # [N] float32
    names = (STEP, ZERO) if weight.least_input is None else (ONE_SIDED_STEP, ONE_SIDED_ZERO)
    step, zero = (graph.weight(each, WIDE.values()[each]) for each in names)
    peak = _peak(graph, name, x, weight.least_input)  # [B, S, 1]
    unit = graph.node("Div", [x, peak], f"{name}/unit")
    rows = graph.node("QuantizeLinear", [unit, step, zero], f"{name}/quantized")  # [B, S, K] uint8
    product = graph.node(
        "MatMulIntegerToFloat", [rows, values, step, scale, zero], f"{name}/unit_product", domain=MICROSOFT
    )
    return graph.node("Mul", [product, peak], f"{name}/product")


def _peak(graph: GraphBuilder, name: str, x: str, least_input: float | None) -> str:
    last_axis = graph.constant([-1], np.int64)
    if least_input is None:
        magnitude = graph.node("Abs", [x], f"{name}/magnitude")
        return graph.node("ReduceMax", [magnitude, last_axis], f"{name}/peak", keepdims=1)
    largest = graph.node("ReduceMax", [x, last_axis], f"{name}/largest", keepdims=1)
    reach = graph.constant(-least_input * WIDE.one_sided_steps / WIDE.one_sided_zero, np.float32)
    return graph.node("Max", [largest, reach], f"{name}/peak")
