"""A mean and how far chance may have moved it, where values that stand together are not independent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LARGEST_EXPONENT = 709.0
"""exp of more is no float64: the figure of a model that makes no sense stops there."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error, None where a single cluster tells nothing about chance."""

    mean: float
    standard_error: float | None

    def exponential(self) -> Estimate:
        """The estimate of exp(mean): d exp(x) = exp(x) dx."""
        value = math.exp(min(self.mean, LARGEST_EXPONENT))
        return Estimate(value, None if self.standard_error is None else value * self.standard_error)


def clustered_mean(values: npt.ArrayLike, sizes: npt.NDArray[np.int64]) -> Estimate:
    """The mean of all values; its standard error takes clusters, not values, as independent.

    Tokens of one window share a text and a context: a window that is hard moves them all. For G clusters c of n_c
    values with sum S_c, N values in all, mean m:

        standard error = sqrt(G / (G - 1) * sum over c of (S_c - m n_c)^2) / N

    With clusters of one value each, this is the usual standard error of a mean.

    Args:
        values: [N], cluster after cluster.
        sizes: [G] int64, each above 0, that add up to N.
    Source: Cochran, Sampling Techniques (1977), 9A, for clusters of unequal sizes.
    """
    array = np.asarray(values, np.float64)
    n_clusters, n_values = len(sizes), len(array)
    assert n_values == sizes.sum() > 0
    mean = float(array.mean())
    if n_clusters == 1:
        return Estimate(mean, None)
    starts = np.cumsum(sizes) - sizes
    deviations = np.add.reduceat(array - mean, starts)  # [G]
    variance = n_clusters / (n_clusters - 1) * float((deviations**2).sum())
    return Estimate(mean, math.sqrt(variance) / n_values)
