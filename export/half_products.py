"""How a matrix is multiplied by float16 activations: as `export.products`, for graphs that do not run on the CPU.

A table is padded to whole `TABLE_ROWS`; the writer of the graph cuts off what the padding gave.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from quantization.blocks import Blocks
from quantization.int8 import INT8_MAX, Int8Columns
from quantization.recipes import Quantized, SplitMatrix, Tensor, TokenTable, quantize_matrix, quantize_table
from runtime.errors import QuantizationError
from runtime.package import Device, Precision

from .checkpoint_files import Float32Array
from .onnx_builder import MICROSOFT, GraphBuilder
from .products import OWN_ACCUMULATION, BlockTable, Products, Table, block_product, split_inputs

HALF_MAX = float(np.finfo(np.float16).max)

SMALLEST_STEP = float(np.finfo(np.float16).tiny)
"""Of inputs: what is always 0 still needs a scale to be divided by."""

TABLE_ROWS = 64
"""A product of so many rows, or a multiple, is what the fast kernels take: those of blocks refuse other than 8, and
dequantize the whole table for each token instead."""


def as_half(name: str, values: Float32Array) -> NDArray[np.float16]:
    """A tensor as float16.

    Raises:
        QuantizationError: a value is beyond its range, or not finite.
    """
    peak = float(np.abs(values).max())
    if not peak <= HALF_MAX:  # "not <=" because a NaN must not pass
        raise QuantizationError(
            f"{name} holds {peak:.3g}, expected at most {HALF_MAX:.0f}, the largest float16; convert for the CPU"
        )
    return values.astype(np.float16)


class HalfTable:
    """float16 rows; `standard` says that ONNX's own operators are all there is."""

    def __init__(self, graph: GraphBuilder, name: str, table: Float32Array, *, standard: bool) -> None:
        self._name, self._standard = name, standard
        padded = np.pad(as_half(name, table), ((0, -len(table) % TABLE_ROWS), (0, 0)))
        self._table = graph.weight(name, padded)

    def embed(self, graph: GraphBuilder, ids: str) -> str:
        return graph.node("Gather", [self._table, ids], f"{self._name}/rows")

    def logits(self, graph: GraphBuilder, x: str, output: str) -> str:
        if self._standard:
            columns = graph.node("Transpose", [self._table], f"{self._name}/columns", perm=[1, 0])
            return graph.node("MatMul", [x, columns], output)
        # a constant's Transpose would be folded into a second copy of it
        return graph.node("FusedMatMul", [x, self._table], output, domain=MICROSOFT, transB=1)


class HalfProducts:
    def __init__(self, *, standard: bool) -> None:
        self._standard = standard

    def linear(self, graph: GraphBuilder, name: str, x: str, weight: Tensor) -> str:
        assert isinstance(weight, np.ndarray), "an fp16 package is given what the checkpoint holds"
        return graph.node("MatMul", [x, graph.weight(name, as_half(name, weight))], f"{name}/product")

    def token_table(self, graph: GraphBuilder, name: str, table: Tensor) -> Table:
        assert isinstance(table, np.ndarray), "an fp16 package is given what the checkpoint holds"
        return HalfTable(graph, name, table, standard=self._standard)


class HalfBlockTable(BlockTable):
    """Blocks whose scales are float16; CUDA dequantizes the rows that it picks in one kernel."""

    _scale_dtype = np.float16
    _accuracy_level = OWN_ACCUMULATION

    def _dequantized(self, graph: GraphBuilder, ids: str) -> str:
        scale = graph.node("Unsqueeze", [self._scale, graph.constant([2], np.int64)], f"{self._name}/block_scale")
        return graph.node(
            "GatherBlockQuantized",
            [self._values, ids, scale],
            f"{self._name}/blocks",  # [B, S, blocks, size] float16
            domain=MICROSOFT,
            bits=self._blocks.bits,
            block_size=self._blocks.size,
            gather_axis=0,
            quantize_axis=2,
        )


class WeightOnlyProducts:
    """Blocks of codes whose scales are float16, dequantized as they are multiplied."""

    def __init__(self, recipe: Quantized) -> None:
        self._recipe: Quantized = recipe

    def linear(self, graph: GraphBuilder, name: str, x: str, weight: Tensor) -> str:
        blocks = quantize_matrix(weight, self._recipe) if isinstance(weight, np.ndarray) else weight
        assert isinstance(blocks, Blocks), f"{name} is in blocks"
        stored = [graph.weight(name, blocks.values), graph.weight(f"{name}.scale", as_half(name, blocks.scale))]
        return block_product(graph, x, blocks, stored, f"{name}/product", accuracy_level=OWN_ACCUMULATION)

    def token_table(self, graph: GraphBuilder, name: str, table: Tensor) -> Table:
        blocks = quantize_table(table, self._recipe) if isinstance(table, np.ndarray) else table
        if isinstance(blocks, TokenTable):
            assert blocks.column_scale is None, "where activations are not rounded, nothing is to be evened out"
            blocks = blocks.blocks
        assert isinstance(blocks, Blocks), f"{name} is a table"
        return HalfBlockTable(graph, name, TokenTable(_padded(blocks)))


def _padded(blocks: Blocks) -> Blocks:
    missing = -len(blocks.values) % TABLE_ROWS
    values = np.pad(blocks.values, ((0, missing), (0, 0), (0, 0)))
    scale = np.pad(blocks.scale, ((0, missing), (0, 0)), constant_values=0)
    return Blocks(values, scale, blocks.bits, blocks.size, blocks.n_columns)


class StaticProducts(HalfProducts):
    """int8 x int8 by quantizing and dequantizing, as TensorRT wants it told; tables stay float16."""

    def __init__(self) -> None:
        super().__init__(standard=True)

    def linear(self, graph: GraphBuilder, name: str, x: str, weight: Tensor) -> str:
        """x / s and w / t rounded to int8, x s and w t multiplied: s is one number, t one for each column."""
        if isinstance(weight, SplitMatrix):
            common, outliers = split_inputs(graph, name, x, len(weight.kept))
            assert isinstance(weight.quantized, Int8Columns)
            kept = graph.weight(f"{name}.kept", as_half(name, weight.kept))
            products = [
                self.linear(graph, name, common, weight.quantized),
                graph.node("MatMul", [outliers, kept], f"{name}/outlier_product"),
            ]
            return graph.node("Add", products, f"{name}/whole_product")
        assert isinstance(weight, Int8Columns) and weight.input_peak is not None, f"{name} was calibrated"
        zero = graph.constant(0, np.int8)
        step = np.float32(max(weight.input_peak / INT8_MAX, SMALLEST_STEP))
        input_scale = graph.weight(f"{name}.input_scale", as_half(name, step))
        rounded = graph.node("QuantizeLinear", [x, input_scale, zero], f"{name}/quantized")
        inputs = graph.node("DequantizeLinear", [rounded, input_scale, zero], f"{name}/inputs")
        stored = [graph.weight(name, weight.values), graph.weight(f"{name}.scale", as_half(name, weight.scale))]
        matrix = graph.node("DequantizeLinear", stored, f"{name}/matrix", axis=1)  # [K, N]
        return graph.node("MatMul", [inputs, matrix], f"{name}/product")


DEVICE_PRODUCTS: Mapping[tuple[Device, Precision], Products] = {
    ("cuda", "fp16"): HalfProducts(standard=False),
    ("cuda", "int8"): WeightOnlyProducts("int8-weights"),
    ("cuda", "int4"): WeightOnlyProducts("int4-weights"),
    ("tensorrt", "fp16"): HalfProducts(standard=True),
    ("tensorrt", "int8"): StaticProducts(),
}
