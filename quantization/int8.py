"""int8 weights: one scale per output column for matrix products, one per block for the head and the embedding.

Both are symmetric and round to nearest: scale = max|w| / 127, value = rint(w / scale). What multiplies them is float
activations that the graph quantizes itself, one scale per row (token), so that a token's numbers do not depend on what
else stands in its batch or in its prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import QuantizationError

from .blocks import Blocks
from .grid import SMALLEST_PEAK, Float32Array, Grid

INT8_MAX = 127
"""-128 is left unused: the grid is symmetric, so that a weight and its negative cost the same error."""

ZERO_POINT = 128
"""Where unsigned 8-bit values have their zero."""

ELEMENTS_PER_STEP = 1 << 20
"""Elements that are quantized at a time, so that temporaries stay at 4 MB, in the processor's cache."""


@dataclass(frozen=True, slots=True)
class Int8Columns:
    """A [K, N] matrix as int8 with one scale per column."""

    values: NDArray[np.int8]  # [K, N]
    scale: Float32Array  # [N]
    least_input: float | None = None
    """What multiplies the matrix is never below this, a little below 0; None where it is about as often above 0."""
    input_peak: float | None = None
    """The largest magnitude that calibration saw multiply the matrix; None where it did not look."""


def quantize_columns(weight: Float32Array) -> Int8Columns:
    """Quantize a [K, N] float32 matrix to int8, one scale per output column.

    A zero column gets scale 1.

    Args:
        weight: [K, N] float32, finite.
    Returns:
        values [K, N] int8 in [-127, 127]; scale [N] float32, weight units per step.
    Raises:
        QuantizationError: weight is not 2-D, or not finite.
    """
    if weight.ndim != 2:
        raise QuantizationError(f"a weight to quantize has shape {weight.shape}, expected [in, out]")
    peak = np.maximum(weight.max(axis=0), -weight.min(axis=0))  # [N]
    scale = _scale_of_peak(peak)
    inverse = np.float32(1) / scale
    values = np.empty(weight.shape, np.int8)
    step = max(1, ELEMENTS_PER_STEP // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step] * inverse
        np.rint(rows, out=rows)
        values[start : start + step] = rows
    return Int8Columns(values, scale)


def columns_of_grid(weight: Float32Array, grid: Grid) -> Int8Columns:
    """Store a [K, N] matrix that lies on a grid of one group."""
    return Int8Columns(grid.codes(weight).astype(np.int8), grid.scale[0])


def quantize_blocks(weight: Float32Array, block_size: int) -> Blocks:
    """Quantize a [V, D] float32 matrix to 8 bits, one scale per block of `block_size` values of a row.

    A last block that D does not fill is padded with zeros. A zero block gets scale 1.

    Args:
        weight: [V, D] float32, finite.
        block_size: values that share a scale.
    Returns:
        values [V, ceil(D / block_size), block_size] uint8, zero at 128; scale [V, ceil(D / block_size)] float32.
    Raises:
        QuantizationError: weight is not 2-D, or not finite.
    """
    if weight.ndim != 2:
        raise QuantizationError(f"a weight to quantize has shape {weight.shape}, expected [rows, columns]")
    n_rows, n_columns = weight.shape
    n_blocks = -(-n_columns // block_size)
    values = np.empty((n_rows, n_blocks, block_size), np.uint8)
    scale = np.empty((n_rows, n_blocks), np.float32)
    step = max(1, ELEMENTS_PER_STEP // n_columns)
    for start in range(0, n_rows, step):
        rows = weight[start : start + step]
        if n_blocks * block_size != n_columns:
            rows = np.pad(rows, ((0, 0), (0, n_blocks * block_size - n_columns)))
        blocks = rows.reshape(-1, n_blocks, block_size)  # [rows, n_blocks, block_size]
        scale[start : start + step] = _scale_of_peak(np.maximum(blocks.max(axis=2), -blocks.min(axis=2)), first=start)
        steps = np.rint(blocks / scale[start : start + step, :, None])
        values[start : start + step] = steps + np.float32(ZERO_POINT)
    return Blocks(values, scale, bits=8, size=block_size, n_columns=n_columns)


def _scale_of_peak(peak: Float32Array, first: int = 0) -> Float32Array:
    """Weight units per step, for the largest magnitude that 127 steps must reach; `peak[0]` is of number `first`."""
    if not np.isfinite(peak).all():
        where, *block = np.argwhere(~np.isfinite(peak))[0].tolist()
        place = f"row {first + where}, block {block[0]}" if block else f"column {where}"
        raise QuantizationError(f"a weight is not finite in {place}; the checkpoint is damaged")
    scale: Float32Array = np.where(peak > SMALLEST_PEAK, peak / np.float32(INT8_MAX), np.float32(1))
    return scale
