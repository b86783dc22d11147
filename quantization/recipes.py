"""What each recipe makes of a matrix: with the inputs' H = X^T X where calibration knows it, plainly without.

int8: a scale for each output column; head and embedding in blocks of 64. int4: blocks of 256, where onnxruntime is
fastest; head and embedding in blocks of 32, for they lose the most. These two multiply by activations of 8 bits; what
the others multiply by says their second half, see `Quantized`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from runtime.errors import QuantizationError

from .blocks import Blocks, blocks_of_codes, blocks_of_grid, weights_of_blocks
from .gptq import DAMPING, round_compensated
from .grid import Float32Array, searched_grid, symmetric_grid
from .int8 import INT8_MAX, Int8Columns, columns_of_grid, quantize_blocks, quantize_columns
from .refit import refitted

Quantized = Literal["int8", "int4", "int8-weights", "int4-weights", "int8-static"]
"""Recipes that quantize. "-weights": activations stay float16, for CUDA. "-static": all activations of a product share
one scale that calibration fixes, for TensorRT; head and embedding stay float16."""

WEIGHTS_ONLY: tuple[Quantized, ...] = ("int8-weights", "int4-weights")

HIGHEST_CODE: Mapping[Quantized, int] = {
    "int8": INT8_MAX,
    "int4": 8,
    "int8-weights": INT8_MAX,
    "int4-weights": 8,
    "int8-static": INT8_MAX,
}
"""Steps from zero to the largest weight of a group."""

TABLE_BLOCK_SIZES: Mapping[Quantized, tuple[int, ...]] = {
    "int8": (64, 32, 16),
    "int4": (32, 16),
    "int8-weights": (32, 16),
    "int4-weights": (32, 16),
}
"""Codes of head and embedding that share a scale: the first that divides D, else the last, its tail padded."""

MATRIX_BLOCK_SIZES: Mapping[Quantized, tuple[int, ...]] = {
    "int4": (256, 128, 64, 32, 16),
    "int8-weights": (32, 16),
    "int4-weights": (32, 16),
}
"""Likewise of the other matrices, where they are in blocks: the first that their K fills, or all but MOST_PADDING of
it. On a CPU the longer are the faster: at 774M a prompt took 0.7 of the time with 128 instead of 64; with 256 instead
of 128 it took 0.91 and a step 0.95, for a KL of 0.0109 instead of 0.0104 on the demo model. On CUDA onnxruntime 1.31
multiplies a few tokens by 4-bit blocks of 16 to 128 in one kernel, and by 8-bit ones of 32 and 64 at every official
width; its product of many tokens takes blocks of 32 only."""

MOST_PADDING = 1 / 16
"""Of a matrix's rows: 1558M's 1,600 are padded to 1,664, in blocks of 128, and not to 1,792."""

INT4: tuple[Quantized, ...] = ("int4", "int4-weights")

TABLE_DAMPING = 0.3
"""For a table that is also the embedding: the more, the less its rows move for the sake of the head. On the demo model
at 4 bits, KL of head and embedding: 0.0047 and 0.0046 at 0.01, 0.0054 and 0.0026 at 0.3, 0.0078 and 0.0021 at 3."""


CACHE_MARGIN = 1.1
"""How far beyond what calibration met a key or value may go before it is cut off."""

SMALLEST_PEAK = np.float32(1e-6)
"""Of a channel of keys or values: one that is always 0 still needs a scale."""


@dataclass(frozen=True, slots=True)
class SplitMatrix:
    """A [K + O, N] matrix whose last O rows stay float32: what multiplies them is too large to share a scale."""

    quantized: Int8Columns | Blocks  # [K, N]
    kept: Float32Array  # [O, N]


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The [V, D] matrix of embedding and head: row = row of the blocks * column_scale, where there is one."""

    blocks: Blocks
    column_scale: Float32Array | None = None  # [D]


Tensor: TypeAlias = "Float32Array | Int8Columns | Blocks | SplitMatrix | TokenTable"
"""What a tensor of a model may have become."""


def cache_scale_name(layer: int, kind: str) -> str:
    """What the scales [1, H, 1, D] of a layer's keys or values are called among a model's tensors, if it has them."""
    return f"h.{layer}.attn.{kind}_scale"


def cache_scale(items: Float32Array, n_head: int) -> Float32Array:
    """Scales [1, H, 1, D] of int8 keys or values: one for each channel, largest magnitude / 127, a little to spare.

    Args:
        items: [T, H * D] float32, keys or values of a calibration text.
        n_head: H.
    """
    peak = np.abs(items).max(axis=0).reshape(1, n_head, 1, -1)
    scale: Float32Array = np.maximum(peak, SMALLEST_PEAK) * np.float32(CACHE_MARGIN / INT8_MAX)
    return scale


def matrix_group(n_rows: int, precision: Quantized) -> int:
    """Rows of a [K, N] matrix that share a scale within a column."""
    if precision not in MATRIX_BLOCK_SIZES:
        return n_rows
    sizes = MATRIX_BLOCK_SIZES[precision]
    return next((size for size in sizes if -n_rows % size <= MOST_PADDING * n_rows), sizes[-1])


def table_block_size(n_columns: int, precision: Quantized) -> int:
    """Columns of a [V, D] table that share a scale within a row."""
    sizes = TABLE_BLOCK_SIZES[precision]
    return next((size for size in sizes if n_columns % size == 0), sizes[-1])


def quantize_matrix(
    weight: Float32Array, precision: Quantized, hessian: Float32Array | None = None
) -> Int8Columns | Blocks:
    """Quantize a [K, N] float32 matrix; `hessian` [K, K] is X^T X of its inputs.

    Raises:
        QuantizationError: weight is not 2-D, or not finite; or the inputs were not.
    """
    size = matrix_group(len(weight), precision)
    if precision in INT4:
        return _int4_blocks(weight, size, hessian, DAMPING)
    if precision in MATRIX_BLOCK_SIZES:
        return _int8_blocks(weight.T, size, hessian, DAMPING)
    if hessian is None:
        return quantize_columns(weight)
    grid = symmetric_grid(weight, highest=INT8_MAX, group=size)
    return columns_of_grid(round_compensated(weight, hessian, grid, damping=DAMPING), grid)


def quantize_table(table: Float32Array, precision: Quantized, hessian: Float32Array | None = None) -> Blocks:
    """Quantize a [V, D] float32 table; `hessian` [D, D] is X^T X of the head's inputs.

    Raises:
        QuantizationError: as `quantize_matrix`.
    """
    size = table_block_size(table.shape[-1], precision)
    if hessian is None and precision not in INT4:
        return quantize_blocks(table, size)
    damaged = np.flatnonzero(~np.isfinite(table).all(axis=-1))
    if len(damaged):
        raise QuantizationError(f"a weight is not finite in row {damaged[0]}; the checkpoint is damaged")
    if precision in INT4:
        return _int4_blocks(table.T, size, hessian, TABLE_DAMPING)
    return _int8_blocks(table, size, hessian, TABLE_DAMPING)


def _int8_blocks(rows: Float32Array, size: int, hessian: Float32Array | None, damping: float) -> Blocks:
    """A [N, K] matrix in 8-bit blocks along K."""
    if hessian is None:
        return quantize_blocks(rows, size)
    grid = symmetric_grid(rows.T, highest=INT8_MAX, group=size)
    return blocks_of_grid(round_compensated(rows.T, hessian, grid, damping=damping), grid, bits=8)


def _int4_blocks(weight: Float32Array, size: int, hessian: Float32Array | None, damping: float) -> Blocks:
    """The transpose of a [K, N] matrix in 4-bit blocks along K."""
    importance = np.ones(len(weight), np.float32) if hessian is None else np.diag(hessian)
    grid = searched_grid(weight, bits=4, group=size, importance=importance)
    if hessian is None:
        return blocks_of_grid(weight, grid, bits=4)
    codes = grid.codes(round_compensated(weight, hessian, grid, damping=damping))
    return blocks_of_codes(codes, refitted(grid, weight, codes, hessian, damping=damping), bits=4)


def dequantized(tensor: Tensor) -> Float32Array:
    """What a tensor's codes stand for: [K, N] of a matrix, [V, D] of a table."""
    result: Float32Array
    match tensor:
        case Int8Columns():
            result = tensor.values * tensor.scale
        case Blocks():
            result = weights_of_blocks(tensor).T
        case SplitMatrix():
            result = np.concatenate([dequantized(tensor.quantized), tensor.kept])
        case TokenTable():
            result = weights_of_blocks(tensor.blocks)
            if tensor.column_scale is not None:
                result *= tensor.column_scale
        case _:
            result = tensor
    return result


def times_columns(tensor: Tensor, factors: Float32Array) -> Tensor:
    """A [K, N] matrix in any form, or a [N] vector, its columns times `factors` [N]; codes stay as they are."""
    match tensor:
        case Int8Columns() | Blocks():
            return _times_scales(tensor, factors)
        case SplitMatrix():
            return SplitMatrix(_times_scales(tensor.quantized, factors), tensor.kept * factors)
    assert isinstance(tensor, np.ndarray), "a table has no columns of a product"
    return tensor * factors


def _times_scales(matrix: Int8Columns | Blocks, factors: Float32Array) -> Int8Columns | Blocks:
    if isinstance(matrix, Int8Columns):
        return replace(matrix, scale=matrix.scale * factors)
    return replace(matrix, scale=matrix.scale * factors[:, None])
