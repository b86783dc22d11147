"""Where the weights of a matrix may lie: whole steps of a scale that a group of rows shares within a column."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import QuantizationError

Float32Array = NDArray[np.float32]

SMALLEST_PEAK = 1e-30
"""Below it a group counts as zero: its scale could not be inverted in float32."""

RANGES = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Shares of a group's largest weight that are tried as its range: cutting the largest may serve all the others, and so
may steps a little wider than it needs."""

COLUMNS_PER_STEP = 512
"""Columns that are searched at a time, so that temporaries stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class Grid:
    """weight = code * scale, code a whole number in [lowest, highest]; a column's rows in groups of `group`."""

    scale: Float32Array  # [ceil(K / group), N], weight units per step; may be negative
    lowest: int
    highest: int
    group: int

    def columns(self, chosen: slice) -> Grid:
        """The same for some columns."""
        return Grid(self.scale[:, chosen], self.lowest, self.highest, self.group)

    def nearest(self, row: int, values: Float32Array) -> Float32Array:
        """The points of the grid next to the values [N] of one row."""
        scale = self.scale[row // self.group]
        codes: Float32Array = values / scale
        np.rint(codes, out=codes)
        np.clip(codes, self.lowest, self.highest, out=codes)
        codes *= scale
        return codes

    def codes(self, weight: Float32Array) -> Float32Array:
        """The codes of a matrix [K, N], as floats; a weight on the grid gives its own code exactly."""
        codes: Float32Array = weight / np.repeat(self.scale, self.group, axis=0)[: len(weight)]
        np.rint(codes, out=codes)
        np.clip(codes, self.lowest, self.highest, out=codes)
        return codes


def symmetric_grid(weight: Float32Array, *, highest: int, group: int) -> Grid:
    """Steps on both sides of zero: scale = max|w| / highest of a group. A group of zeros gets scale 1.

    Args:
        weight: [K, N] float32, finite.
        highest: the code of the largest weight.
        group: rows that share a scale; the last group may have fewer.
    Raises:
        QuantizationError: weight is not 2-D, or not finite.
    """
    peak = np.abs(_groups(weight, group)).max(axis=1)  # [G, N]
    return Grid(_scale(peak, highest), -highest, highest, group)


def searched_grid(weight: Float32Array, *, bits: int, group: int, importance: Float32Array) -> Grid:
    """All 2^bits codes, each group's range searched for the least squared error.

    There is one negative code more than positive ones, so a group's scale has the sign that gives it to the largest
    weight.

    Args:
        weight: [K, N] float32, finite.
        bits: of a code.
        group: rows that share a scale; the last group may have fewer.
        importance: [K] float32, what a squared error in each row counts.
    Raises:
        QuantizationError: weight is not 2-D, or not finite.
    """
    groups = _groups(weight, group)  # [G, group, N]
    counts = np.pad(importance, (0, groups.shape[0] * group - len(importance))).reshape(-1, group, 1)
    scale = np.empty((groups.shape[0], weight.shape[1]), np.float32)
    for start in range(0, weight.shape[1], COLUMNS_PER_STEP):
        chosen = slice(start, start + COLUMNS_PER_STEP)
        scale[:, chosen] = _search(groups[:, :, chosen], counts, 2 ** (bits - 1))
    return Grid(scale, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, group)


def _groups(weight: Float32Array, group: int) -> Float32Array:
    """A matrix [K, N] as [G, group, N], the last group filled with zeros."""
    if weight.ndim != 2:
        raise QuantizationError(f"a weight to quantize has shape {weight.shape}, expected [in, out]")
    finite = np.isfinite(weight).all(axis=0)
    if not finite.all():
        where = int(np.flatnonzero(~finite)[0])
        raise QuantizationError(f"a weight is not finite in column {where}; the checkpoint is damaged")
    missing = -len(weight) % group
    whole = np.pad(weight, ((0, missing), (0, 0))) if missing else weight
    return whole.reshape(-1, group, weight.shape[1])


def _search(groups: Float32Array, counts: Float32Array, steps: int) -> Float32Array:
    """The best scale [G, n] of groups [G, group, n] among the ranges."""
    high, low = groups.max(axis=1), groups.min(axis=1)  # [G, n]
    widest = _scale(np.where(high > -low, -high, -low), steps)
    best, least = widest, np.full(widest.shape, np.inf, np.float32)
    for share in RANGES:
        scale = widest * np.float32(share)
        error = groups / scale[:, None]
        np.rint(error, out=error)
        np.clip(error, -steps, steps - 1, out=error)
        error *= scale[:, None]
        error -= groups
        np.square(error, out=error)
        error *= counts
        total = error.sum(axis=1)
        best = np.where(total < least, scale, best)
        least = np.minimum(total, least)
    return best


def _scale(peak: Float32Array, steps: int) -> Float32Array:
    scale: Float32Array = np.where(np.abs(peak) > SMALLEST_PEAK, peak / np.float32(steps), np.float32(1))
    return scale
