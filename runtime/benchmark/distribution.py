"""What a list of measured values says: percentiles, and how two lists differ. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

RESAMPLES = 4000
SEED = 0
"""The same figures give the same interval."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of n measured values, in their unit."""

    n: int
    mean: float
    std: float
    p50: float
    p90: float
    p95: float
    p99: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float] | Float64Array) -> Distribution:
        """Raises ValueError for no values. Percentiles are interpolated linearly, as numpy's default is."""
        array = np.asarray(values, np.float64)
        if not array.size:
            raise ValueError("no values")
        p50, p90, p95, p99 = np.percentile(array, [50, 90, 95, 99])
        return cls(
            n=array.size,
            mean=float(array.mean()),
            std=float(array.std(ddof=1)) if array.size > 1 else 0.0,
            p50=float(p50),
            p90=float(p90),
            p95=float(p95),
            p99=float(p99),
            min=float(array.min()),
            max=float(array.max()),
        )


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float


def relative_spread(values: Sequence[float]) -> float:
    """The middle half's width as a share of the median."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float((high - low) / middle)


def ratio_of_rounds(values: Sequence[float], baseline: Sequence[float], *, confidence: float) -> Interval:
    """How many times the baseline's, where both were measured in the same rounds, one after the other.

    exp of the middle half's mean of the rounds' log ratios: what drifts from round to round cancels in each ratio, and
    an outlier on either side does not count. The interval is a bootstrap over rounds.

    Args:
        values, baseline: [rounds] each, above 0.
        confidence: 0 to 1, of the interval.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13 (percentile intervals).
    """
    logs = np.log(np.asarray(values, np.float64)) - np.log(np.asarray(baseline, np.float64))
    rng = np.random.default_rng(SEED)
    draws = _middle_mean(logs[rng.integers(0, len(logs), (RESAMPLES, len(logs)))])
    return _interval(float(_middle_mean(logs)), draws, confidence)


def ratio_of_medians(values: Sequence[float], baseline: Sequence[float], *, confidence: float) -> Interval:
    """How many times the baseline's, where the two were measured at different times, so often as may be."""
    logs, base = np.log(np.asarray(values, np.float64)), np.log(np.asarray(baseline, np.float64))
    rng = np.random.default_rng(SEED)
    draws = [np.median(each[rng.integers(0, len(each), (RESAMPLES, len(each)))], axis=1) for each in (logs, base)]
    return _interval(float(np.median(logs) - np.median(base)), draws[0] - draws[1], confidence)


def _middle_mean(values: Float64Array) -> Float64Array:
    """Mean of the middle half along the last axis."""
    ordered = np.sort(values, axis=-1)
    cut = ordered.shape[-1] // 4
    result: Float64Array = ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1)
    return result


def _interval(log_value: float, log_draws: Float64Array, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(log_draws, [tail, 1 - tail])
    return Interval(float(np.exp(log_value)), float(np.exp(low)), float(np.exp(high)))
