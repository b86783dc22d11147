"""Rounding that looks ahead: each row of a matrix makes up for the errors of the rows that were rounded before it.

What counts is not how far the weights move but how far the products x @ w do, over inputs that the model meets:
tr(E^T H E) for an error E [K, N] and H = X^T X [K, K]. With H = (I + U) D (I + U)^T, U strictly upper triangular, that
is the sum over k of D_k |E_k + sum_{j<k} U_jk E_j|^2. So where row k is rounded at w_k + sum_{j<k} U_jk E_j, nothing
but its own rounding is left.

Sources: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022);
Chee et al., "QuIP: 2-Bit Quantization of Large Language Models With Guarantees" (2023), section 4, for this form of
the same rounding, which needs no inverse of H.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.errors import QuantizationError

from .grid import Float32Array, Grid

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: inputs that calibration never saw count a little too."""

ROWS_PER_STEP = 32
"""Rows between two large products; within them errors are passed on row by row."""

COLUMNS_PER_STEP = 8192
"""Columns that are rounded at a time: a head's errors alone would take as much memory as the head."""


def round_compensated(
    weight: Float32Array, hessian: Float32Array, grid: Grid, *, damping: float = DAMPING
) -> Float32Array:
    """Round a matrix to a grid so that its products stay close to what they were.

    Rows are taken by the size of their inputs, the largest first, while the most others can still make up for them.

    Args:
        weight: [K, N] float32, finite.
        hessian: [K, K] float32, X^T X of inputs X [T, K].
        grid: of `weight`.
        damping: share of the diagonal's mean that is added to it.
    Returns:
        [K, N] float32, points of the grid.
    Raises:
        QuantizationError: the inputs were not finite.
    """
    order = np.argsort(-np.diag(hessian), kind="stable")
    feedback = _feedback(hessian[np.ix_(order, order)], damping)
    rounded = np.empty_like(weight)
    for start in range(0, weight.shape[1], COLUMNS_PER_STEP):
        chosen = slice(start, start + COLUMNS_PER_STEP)
        rounded[:, chosen] = _round_columns(weight[:, chosen], feedback, grid.columns(chosen), order)
    return rounded


def _round_columns(weight: Float32Array, feedback: Float32Array, grid: Grid, order: NDArray[np.intp]) -> Float32Array:
    rounded = np.empty_like(weight)
    errors = np.empty_like(weight)  # in the order of rounding
    for start in range(0, len(order), ROWS_PER_STEP):
        rows = slice(start, min(start + ROWS_PER_STEP, len(order)))
        wanted = weight[order[rows]] + feedback[:start, rows].T @ errors[:start]
        for k in range(rows.start, rows.stop):
            row, target = order[k], wanted[k - start]
            target += feedback[start:k, k] @ errors[start:k]
            rounded[row] = grid.nearest(int(row), target)
            errors[k] = weight[row] - rounded[row]
    return rounded


def _feedback(hessian: Float32Array, damping: float) -> Float32Array:
    """I + U [K, K] of H = (I + U) D (I + U)^T: column k says what each earlier error adds to row k."""
    try:
        # numpy factors into lower times upper: from the last row to the first, that is upper times lower.
        factor = np.linalg.cholesky(damped(hessian, damping)[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError:
        return _feedback(hessian, 10 * damping)  # float32 sums left it indefinite
    result: Float32Array = (factor / np.diag(factor)).astype(np.float32)
    return result


def damped(hessian: Float32Array, damping: float) -> NDArray[np.float64]:
    """X^T X [K, K] in float64, a share of its diagonal's mean added to the diagonal.

    Raises:
        QuantizationError: the inputs were not finite.
    """
    result: NDArray[np.float64] = hessian.astype(np.float64)
    diagonal = np.einsum("kk->k", result)  # a view
    if not np.isfinite(diagonal).all():
        raise QuantizationError("a matrix is given inputs that are not finite; the checkpoint is damaged")
    diagonal += max(damping * float(diagonal.mean()), float(np.finfo(np.float32).tiny))
    return result
