"""Scales fitted once more when the codes are known: least squares over what the products were to be.

A grid is laid before its weights are rounded, for roundings that are independent. Those of `quantization.gptq` are not:
they make up for each other. With the codes C of a column [K] and its group's scales s [G], the error of the products
is (Z s - w)^T H (Z s - w), where Z [K, G] holds in column g the codes of group g, and nothing else. Its minimum over s
is one linear system of G unknowns for each column.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .gptq import damped
from .grid import SMALLEST_PEAK, Float32Array, Grid

PULL = 0.02
"""Towards the scales as they were, as a share of the mean curvature: groups of few codes are not overfitted."""

COLUMNS_PER_STEP = 2048
"""Columns that are fitted at a time: a head's systems alone would take more memory than the head."""


def refitted(grid: Grid, weight: Float32Array, rounded: Float32Array, hessian: Float32Array, *, damping: float) -> Grid:
    """The grid on which the codes of a rounded matrix serve best.

    Args:
        grid: where `rounded` lies.
        weight: [K, N] float32, what was to be rounded.
        rounded: [K, N] float32.
        hessian: [K, K] float32, X^T X of the inputs.
        damping: share of its diagonal's mean that is added to it, as for `round_compensated`.
    Returns:
        Other scales; a scale that would come out as good as zero stays what it was.
    """
    metric = damped(hessian, damping).astype(np.float32)
    scale = np.empty_like(grid.scale)
    for start in range(0, weight.shape[1], COLUMNS_PER_STEP):
        chosen = slice(start, start + COLUMNS_PER_STEP)
        part = grid.columns(chosen)
        scale[:, chosen] = _fitted(part, metric @ weight[:, chosen], part.codes(rounded[:, chosen]), metric)
    return replace(grid, scale=scale)


def _fitted(grid: Grid, wanted: Float32Array, codes: Float32Array, metric: Float32Array) -> Float32Array:
    """Scales [G, N] for codes [K, N]; `wanted` [K, N] is H w."""
    n_groups, n_columns = grid.scale.shape
    starts = np.arange(0, len(codes), grid.group)
    curvature = np.empty((n_columns, n_groups, n_groups))
    for group, start in enumerate(starts):
        rows = slice(start, start + grid.group)
        pulled = codes * (metric[:, rows] @ codes[rows])  # [K, N]
        curvature[:, :, group] = np.add.reduceat(pulled, starts, axis=0).T
    target = np.add.reduceat(codes * wanted, starts, axis=0).T.astype(np.float64)  # [N, G]
    before = grid.scale.T.astype(np.float64)
    diagonal = np.einsum("ngg->ng", curvature)  # a view
    pull = PULL * diagonal.mean(axis=1, keepdims=True) + np.finfo(np.float32).tiny
    diagonal += pull
    target += pull * before
    after = np.linalg.solve(curvature, target[..., None])[..., 0]
    steps: Float32Array = np.where(np.abs(after) > SMALLEST_PEAK, after, before).T.astype(np.float32)
    return steps
