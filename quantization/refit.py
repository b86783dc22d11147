"""Scales fitted once more when the codes are known: least squares over what the products were to be.

A grid is laid before its weights are rounded, for roundings that are independent. Those of `quantization.gptq` are not:
they make up for each other. With the codes C of a column [K] and its group's scales s [G], the error of the products
is (Z s - w)^T H (Z s - w), where Z [K, G] holds in column g the codes of group g, and nothing else. Its minimum over s
is one linear system of G unknowns for each column.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .gptq import damped
from .grid import SMALLEST_PEAK, Float32Array, Grid

PULL = 0.02
"""Towards the scales as they were, as a share of the mean curvature: groups of few codes are not overfitted."""

BYTES_PER_STEP = 64 << 20
"""Of the systems that are solved at a time: a head's alone would take more memory than the head."""

COLUMNS_PER_STEP = 2048
"""At most so many at a time."""


def refitted(grid: Grid, weight: Float32Array, codes: Float32Array, hessian: Float32Array, *, damping: float) -> Grid:
    """The grid on which the codes of a rounded matrix serve best.

    Args:
        grid: what the matrix was rounded on.
        weight: [K, N] float32, what was to be rounded.
        codes: [K, N] float32, what became of it.
        hessian: [K, K] float32, X^T X of the inputs.
        damping: share of its diagonal's mean that is added to it, as for `round_compensated`.
    Returns:
        Other scales. Those of a column stay what they were if it would lose, as where float32 sums left H indefinite;
        and one that would come out as good as zero stays.
    """
    missing = -len(weight) % grid.group
    metric = np.pad(damped(hessian, damping).astype(np.float32), (0, missing))  # a last group is filled with zeros
    scale = np.empty_like(grid.scale)
    step = max(1, min(COLUMNS_PER_STEP, BYTES_PER_STEP // (8 * len(scale) ** 2)))
    for start in range(0, weight.shape[1], step):
        chosen = slice(start, start + step)
        part, wanted = (np.pad(columns[:, chosen], ((0, missing), (0, 0))) for columns in (codes, weight))
        scale[:, chosen] = _fitted(grid.scale[:, chosen], metric @ wanted, part, metric)
    return replace(grid, scale=scale)


def _fitted(scale: Float32Array, wanted: Float32Array, codes: Float32Array, metric: Float32Array) -> Float32Array:
    """Scales [G, N] in place of `scale`, for codes [G * group, N]; `wanted` is H w, of the same shape."""
    n_groups, n_columns = scale.shape
    grouped = codes.reshape(n_groups, -1, n_columns)
    size = grouped.shape[1]
    curvature = np.empty((n_columns, n_groups, n_groups))
    for group in range(n_groups):
        end = (group + 1) * size
        pulled = (metric[:end, end - size : end] @ grouped[group]).reshape(group + 1, size, n_columns)
        curvature[:, : group + 1, group] = np.einsum("gkn,gkn->ng", grouped[: group + 1], pulled)
        curvature[:, group, : group + 1] = curvature[:, : group + 1, group]
    target = np.einsum("gkn,gkn->ng", grouped, wanted.reshape(grouped.shape)).astype(np.float64)
    before = scale.T.astype(np.float64)  # [N, G]
    diagonal = np.einsum("ngg->ng", curvature)  # a view
    pull = PULL * diagonal.mean(axis=1, keepdims=True) + np.finfo(np.float32).tiny
    diagonal += pull
    target += pull * before
    after = np.linalg.solve(curvature, target[..., None])[..., 0]
    after = np.where(np.abs(after) > SMALLEST_PEAK, after, before)

    def cost(scales: NDArray[np.float64]) -> NDArray[np.float64]:
        """[N, 1], but for what no scale changes."""
        bent = np.einsum("ng,ngh,nh->n", scales, curvature, scales)[:, None]
        result: NDArray[np.float64] = bent - 2 * (target * scales).sum(axis=1, keepdims=True)
        return result

    best: Float32Array = np.where(cost(after) <= cost(before), after, before).T.astype(np.float32)
    return best
