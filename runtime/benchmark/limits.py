"""How far decoding is from what memory allows, and how long a step takes at lengths that were not run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import RequestError
from ..package import Manifest
from .timing import RunTimes

Float64Array = npt.NDArray[np.float64]

RESAMPLES = 1000
SEED = 0
CONFIDENCE = 0.95

FEWEST_RUNS = 3
"""Below this a bootstrap over runs says nothing."""

LENGTHS_APART = 1.5
"""The longest cache must hold this many times the shortest, or the slope is read off noise."""

WORST_MISFIT = 0.05
"""Of a step's time: where the fit misses its own cases by more, a straight line is not what this machine does."""

FARTHEST = 2.5
"""Beyond this many times the longest cache that was run, a prediction is called far."""


def bytes_per_step(manifest: Manifest, runs: Sequence[RunTimes]) -> float | None:
    """The least that one decode step of these runs reads, in bytes, at their mean length; None without decode steps.

    All weights but tables that rows are picked from, once for the whole batch, and each prompt's keys and values, those
    of the step's own token included.
    """
    steps = len(runs[0].itl_ms)
    if not steps:
        return None
    tokens = float(np.mean([sum(run.prompt_tokens) + len(run.prompt_tokens) * (steps + 1) / 2 for run in runs]))
    return manifest.decode_weight_bytes + manifest.cache_bytes_per_token * tokens


@dataclass(frozen=True, slots=True)
class Prediction:
    """The median time of a decode step that was not run."""

    past_tokens: int  # in the cache, of each prompt
    batch: int
    itl_ms: float
    low: float
    high: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepModel:
    """t = base + per_cached_token x cached tokens of all prompts + per_prompt x batch, in milliseconds.

    Attributes:
        coefficients: [3]; the last is 0 where one batch size was run.
        draws: [resamples, 3], the same from resampled runs.
        misfit: how far the fit is from the medians of its own cases, as a share of them, root mean square.
        longest: tokens in the cache of all prompts, the most that was run.
        batches: sizes that were run.
    """

    coefficients: Float64Array
    draws: Float64Array
    misfit: float
    longest: float
    batches: tuple[int, ...]

    @classmethod
    def fit(cls, cases: Sequence[Sequence[RunTimes]]) -> StepModel:
        """Fit cases [runs] of one engine: least squares over the medians of each step over its case's runs.

        Raises:
            RequestError: too few runs, or lengths too close together, to tell.
        """
        steps = [_CaseSteps.of(runs) for runs in cases if runs and runs[0].itl_ms]
        n_runs = min((len(case.times) for case in steps), default=0)
        if n_runs < FEWEST_RUNS:
            raise RequestError(
                f"{n_runs} runs with decode steps, a prediction needs at least {FEWEST_RUNS}; see --runs"
            )
        cached = np.concatenate([case.cached.ravel() for case in steps])
        if cached.max() < LENGTHS_APART * cached.min():
            raise RequestError(
                f"the runs had {cached.min():.0f} to {cached.max():.0f} tokens in the cache, a prediction needs "
                f"lengths at least {LENGTHS_APART} times apart; see --prompt-tokens"
            )
        batches = tuple(sorted({case.batch for case in steps}))
        rng = np.random.default_rng(SEED)
        coefficients = _least_squares(steps, [slice(None)] * len(steps), batches)
        draws = [
            _least_squares(steps, [rng.integers(0, len(case.times), len(case.times)) for case in steps], batches)
            for _ in range(RESAMPLES)
        ]
        misses = [case.miss(coefficients) for case in steps]
        return cls(
            coefficients=coefficients,
            draws=np.array(draws),
            misfit=float(np.sqrt(np.mean(np.square(misses)))),
            longest=float(cached.max()),
            batches=batches,
        )

    def predict(self, past_tokens: int, batch: int) -> Prediction:
        """A step behind `past_tokens` tokens of each of `batch` prompts.

        The range holds the median with 95% confidence as far as the line is right: it is the bootstrap's, widened by
        how far the line misses what it was fitted to.
        """
        terms = np.array([1.0, batch * past_tokens, batch])
        value = float(terms @ self.coefficients)
        low, high = np.quantile(self.draws @ terms, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        miss = self.misfit * value
        warnings = []
        if self.misfit > WORST_MISFIT:
            warnings.append(
                f"bad fit: it misses its own cases by {self.misfit:.0%}; the machine was busy, or is no line"
            )
        if batch * past_tokens > FARTHEST * self.longest:
            warnings.append(f"far: {batch * past_tokens / self.longest:.1f} times the longest cache that was run")
        if batch not in self.batches:
            warnings.append(f"batch {batch} was not run")
        return Prediction(
            past_tokens=past_tokens,
            batch=batch,
            itl_ms=value,
            low=value - float(np.hypot(value - low, miss)),
            high=value + float(np.hypot(high - value, miss)),
            warnings=tuple(warnings),
        )


@dataclass(frozen=True, slots=True)
class _CaseSteps:
    """Every decode step of a case: how much the cache held, and how long the step took."""

    batch: int
    cached: Float64Array  # [runs, steps], tokens of all prompts before the step
    times: Float64Array  # [runs, steps], ms

    @classmethod
    def of(cls, runs: Sequence[RunTimes]) -> _CaseSteps:
        times = np.array([run.itl_ms for run in runs])
        batch = len(runs[0].prompt_tokens)
        prompts = np.array([sum(run.prompt_tokens) for run in runs], np.float64)
        return cls(batch, prompts[:, None] + batch * np.arange(times.shape[1]), times)

    def miss(self, coefficients: Float64Array) -> float:
        """How far the fit is from this case, as a share of its median."""
        expected = coefficients[0] + coefficients[1] * self.cached + coefficients[2] * self.batch
        return float(np.median(self.times - expected) / np.median(self.times))


def _least_squares(
    steps: Sequence[_CaseSteps], chosen: Sequence[slice | npt.NDArray[np.int64]], batches: Sequence[int]
) -> Float64Array:
    """The [3] coefficients for these runs of each case; shares of time count, so that slow cases weigh no more."""
    terms, times = [], []
    for case, runs in zip(steps, chosen, strict=True):
        time, cached = np.median(case.times[runs], axis=0), np.median(case.cached[runs], axis=0)  # [steps] each
        terms.append(np.stack([np.ones_like(cached), cached, np.full_like(cached, case.batch)], axis=1))
        times.append(time)
    matrix, target = np.concatenate(terms), np.concatenate(times)
    known = 3 if len(batches) > 1 else 2
    solution, *_ = np.linalg.lstsq(matrix[:, :known] / target[:, None], np.ones_like(target), rcond=None)
    coefficients = np.zeros(3)
    coefficients[:known] = solution
    return coefficients
