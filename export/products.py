"""How each precision stores a matrix in the graph and multiplies by it; the rest of the graph knows no precision.

A `Linear` is one of the four matrices of a block; a `TokenTable` is the [V, D] matrix that is the embedding and, in a
tied model, the head too: it is stored once, the embedding picks its rows and the head multiplies by its transpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from quantization.int8 import INT8_MAX, ZERO_POINT, quantize_blocks, quantize_columns
from runtime.package import Precision

from .checkpoint_files import Float32Array
from .onnx_builder import MICROSOFT, GraphBuilder

HEAD_BLOCK_SIZES = (64, 32, 16)
"""Weights of the int8 table that share a scale: the first that divides D, else the last, its tail padded with zeros."""

INT8_ACCUMULATION = 4
"""MatMulNBits' accuracy_level: quantize the activations to int8 too. Integer products are the fast ones on a CPU."""


class TokenTable(Protocol):
    def embed(self, graph: GraphBuilder, ids: str) -> str:
        """ids [B, S] -> rows [B, S, D] float32."""

    def logits(self, graph: GraphBuilder, x: str, output: str) -> str:
        """x [B, S, D] -> x @ table.T [B, S, V] float32, named `output`."""


class Products(Protocol):
    def linear(self, graph: GraphBuilder, name: str, x: str, weight: Float32Array) -> str:
        """x [B, S, K], weight [K, N] -> x @ weight [B, S, N] float32; `name` is the matrix's canonical name."""

    def token_table(self, graph: GraphBuilder, name: str, table: Float32Array) -> TokenTable:
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
    def linear(self, graph: GraphBuilder, name: str, x: str, weight: Float32Array) -> str:
        return graph.node("MatMul", [x, graph.weight(name, weight)], f"{name}/product")

    def token_table(self, graph: GraphBuilder, name: str, table: Float32Array) -> TokenTable:
        return Fp32Table(graph, name, table)


def head_block_size(n_columns: int) -> int:
    """Weights that share a scale in a table of D = `n_columns`."""
    return next((size for size in HEAD_BLOCK_SIZES if n_columns % size == 0), HEAD_BLOCK_SIZES[-1])


class Int8Table:
    """8-bit blocks along D, which MatMulNBits and GatherBlockQuantized read alike."""

    def __init__(self, graph: GraphBuilder, name: str, table: Float32Array) -> None:
        self._name = name
        self._n_rows, self._n_columns = table.shape
        self._block_size = head_block_size(self._n_columns)
        blocks = quantize_blocks(table, self._block_size)
        self._values = graph.weight(name, blocks.values)  # [V, blocks, block] uint8
        self._scale = graph.weight(f"{name}.scale", blocks.scale)  # [V, blocks] float32

    def embed(self, graph: GraphBuilder, ids: str) -> str:
        scale = graph.node("Unsqueeze", [self._scale, graph.constant([2], np.int64)], f"{self._name}/block_scale")
        blocks = graph.node(
            "GatherBlockQuantized",
            [self._values, ids, scale],
            f"{self._name}/blocks",  # [B, S, blocks, block] float32
            domain=MICROSOFT,
            bits=8,
            block_size=self._block_size,
            gather_axis=0,
            quantize_axis=2,
        )
        rows = graph.node("Reshape", [blocks, graph.constant([0, 0, -1], np.int64)], f"{self._name}/rows")
        if self._n_columns % self._block_size == 0:
            return rows
        bounds = [graph.constant([bound], np.int64) for bound in (0, self._n_columns, 2)]  # start, end, axis
        return graph.node("Slice", [rows, *bounds], f"{self._name}/unpadded")

    def logits(self, graph: GraphBuilder, x: str, output: str) -> str:
        return graph.node(
            "MatMulNBits",
            [x, self._values, self._scale],
            output,
            domain=MICROSOFT,
            bits=8,
            block_size=self._block_size,
            K=self._n_columns,
            N=self._n_rows,
            accuracy_level=INT8_ACCUMULATION,
        )


class Int8Products:
    """int8 weights per column x uint8 activations per row.

    peak = max|x| of a row, q = rint(127 x / peak) + 128, y = (q - 128) @ w * (w_scale / 127) * peak

    The usual DynamicQuantizeMatMul has one activation scale for the whole [B, S, K]: the same token would get other
    numbers in another batch or another piece of the prompt. A row of zeros needs no guard: 0 / 0 quantizes to some
    integer, which a peak of 0 turns into 0 again.
    """

    def linear(self, graph: GraphBuilder, name: str, x: str, weight: Float32Array) -> str:
        columns = quantize_columns(weight)
        values = graph.weight(name, columns.values)  # [K, N] int8
        scale = graph.weight(f"{name}.scale", columns.scale)  # [N] float32
        step = graph.constant(1 / INT8_MAX, np.float32)
        zero = graph.constant(ZERO_POINT, np.uint8)
        magnitude = graph.node("Abs", [x], f"{name}/magnitude")
        last_axis = graph.constant([-1], np.int64)
        peak = graph.node("ReduceMax", [magnitude, last_axis], f"{name}/peak", keepdims=1)  # [B, S, 1]
        unit = graph.node("Div", [x, peak], f"{name}/unit")
        rows = graph.node("QuantizeLinear", [unit, step, zero], f"{name}/quantized")  # [B, S, K] uint8
        product = graph.node(
            "MatMulIntegerToFloat", [rows, values, step, scale, zero], f"{name}/unit_product", domain=MICROSOFT
        )
        return graph.node("Mul", [product, peak], f"{name}/product")

    def token_table(self, graph: GraphBuilder, name: str, table: Float32Array) -> TokenTable:
        return Int8Table(graph, name, table)


PRODUCTS: Mapping[Precision, Products] = {"fp32": Fp32Products(), "int8": Int8Products()}
