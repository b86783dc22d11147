"""Blocks: a matrix in codes of 4 or 8 bits, one scale for so many neighbours of a row, as MatMulNBits reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .grid import Float32Array, Grid


@dataclass(frozen=True, slots=True)
class Blocks:
    """A [N, K] matrix: weight = (code - 2^(bits - 1)) * scale. A tail that fills no block is padded with zeros."""

    values: NDArray[np.uint8]  # [N, ceil(K / size), size * bits / 8]; of two codes in a byte the lower bits come first
    scale: Float32Array  # [N, ceil(K / size)]
    bits: int
    size: int  # codes that share a scale
    n_columns: int  # K


def blocks_of_grid(weight: Float32Array, grid: Grid, *, bits: int) -> Blocks:
    """Store the transpose of a [K, N] matrix that lies on a grid of groups along K."""
    return blocks_of_codes(grid.codes(weight), grid, bits=bits)


def blocks_of_codes(codes: Float32Array, grid: Grid, *, bits: int) -> Blocks:
    """Store the transpose of a [K, N] matrix by its codes on a grid of groups along K."""
    n_rows, n_columns = codes.shape
    padded = np.pad(codes, ((0, -n_rows % grid.group), (0, 0)))
    padded += np.float32(2 ** (bits - 1))
    values = np.ascontiguousarray(padded.T.astype(np.uint8)).reshape(n_columns, -1, grid.group)
    if bits == 4:
        values = values[:, :, 0::2] | values[:, :, 1::2] << 4
    return Blocks(values, np.ascontiguousarray(grid.scale.T), bits, grid.group, n_rows)


def weights_of_blocks(blocks: Blocks) -> Float32Array:
    """The matrix [N, K] that the codes stand for."""
    codes = blocks.values
    if blocks.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)  # [N, blocks, size / 2, 2]
    steps = codes.reshape(*blocks.scale.shape, blocks.size).astype(np.float32)
    steps -= np.float32(2 ** (blocks.bits - 1))
    steps *= blocks.scale[:, :, None]
    return steps.reshape(len(steps), -1)[:, : blocks.n_columns]
