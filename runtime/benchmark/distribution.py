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


def ratio_of_rounds(
    values: Sequence[float], baseline: Sequence[float], loads: Sequence[int], *, confidence: float
) -> Interval:
    """How many times the baseline's, where both were measured in the same rounds, one after the other.

    Each load counts once, by the median of its rounds' log ratios: rounds of one load agree with each other more than
    with those of the next. Loads of odd and of even number, in which the two were loaded in opposite order, weigh the
    same, so that what the order does cancels. The interval is a bootstrap over loads, odd and even apart.

    Args:
        values, baseline: [rounds] each, above 0.
        loads: [rounds], the number of the load that a round ran behind; odd and even ones.
        confidence: 0 to 1, of the interval.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13 (percentile intervals).
    """
    logs = np.log(np.asarray(values, np.float64)) - np.log(np.asarray(baseline, np.float64))
    numbers = np.asarray(loads)
    rng = np.random.default_rng(SEED)
    means, draws = [], []
    for parity in (0, 1):
        of_loads = np.array([np.median(logs[numbers == load]) for load in np.unique(numbers) if load % 2 == parity])
        means.append(of_loads.mean())
        draws.append(of_loads[rng.integers(0, len(of_loads), (RESAMPLES, len(of_loads)))].mean(axis=1))
    return _interval(float(np.mean(means)), np.mean(draws, axis=0), confidence)


def ratio_of_medians(values: Sequence[float], baseline: Sequence[float], *, confidence: float) -> Interval:
    """How many times the baseline's, where the two were measured at different times, so often as may be."""
    logs, base = np.log(np.asarray(values, np.float64)), np.log(np.asarray(baseline, np.float64))
    rng = np.random.default_rng(SEED)
    draws = [np.median(each[rng.integers(0, len(each), (RESAMPLES, len(each)))], axis=1) for each in (logs, base)]
    return _interval(float(np.median(logs) - np.median(base)), draws[0] - draws[1], confidence)


def _interval(log_value: float, log_draws: Float64Array, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(log_draws, [tail, 1 - tail])
    return Interval(float(np.exp(log_value)), float(np.exp(low)), float(np.exp(high)))
