"""The least that a step must read, and steps that were not run, told from those that were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.benchmark.limits import StepModel, bytes_per_step
from runtime.benchmark.timing import RunTimes
from runtime.errors import RequestError
from runtime.package import read_manifest

BASE, SLOPE, ROW = 30.0, 0.01, 2.0


def run(prompts: Sequence[int], steps: int, *, noise: float = 0.0, seed: int = 0, curve: float = 0.0) -> RunTimes:
    """A run whose steps take BASE + SLOPE x cached + ROW x batch ms, and curve x cached^2."""
    rng = np.random.default_rng(seed)
    cached = sum(prompts) + len(prompts) * np.arange(steps)
    times = BASE + SLOPE * cached + ROW * len(prompts) + curve * cached**2
    times = times * np.exp(noise * rng.standard_normal(steps))
    return RunTimes(tuple(prompts), 100.0, 99.0, tuple(times.tolist()), 100.0 + float(times.sum()))


def runs(prompts: Sequence[int], *, noise: float = 0.0, curve: float = 0.0) -> list[RunTimes]:
    return [run(prompts, 20, noise=noise, seed=seed, curve=curve) for seed in range(5)]


def test_a_step_reads_the_weights_and_every_prompts_cache(demo_int8: Path) -> None:
    manifest = read_manifest(demo_int8)
    token = 2 * 6 * 256 * 4  # keys and values, layers, width, float32
    # two steps behind 10 and 20 tokens: they hold 11 and 21, then 12 and 22, their own token included
    expected = manifest.decode_weight_bytes + token * (32 + 34) / 2
    assert bytes_per_step(manifest, [run([10, 20], 2)]) == expected


def test_no_step_reads_nothing(demo_int8: Path) -> None:
    assert bytes_per_step(read_manifest(demo_int8), [replace(run([10], 2), itl_ms=())]) is None


def test_a_straight_line_is_found_again() -> None:
    model = StepModel.fit([runs([100]), runs([400]), runs([100] * 4)])
    np.testing.assert_allclose(model.coefficients, [BASE, SLOPE, ROW], rtol=1e-9)
    prediction = model.predict(900, 1)
    assert prediction.itl_ms == pytest.approx(BASE + 900 * SLOPE + ROW)
    assert prediction.low == pytest.approx(prediction.high)
    assert prediction.warnings == ()
    assert model.predict(500, 4).itl_ms == pytest.approx(BASE + 4 * 500 * SLOPE + 4 * ROW)


def test_the_range_holds_the_truth_and_noise_widens_it() -> None:
    truth = BASE + 900 * SLOPE + ROW
    widths = []
    for noise in (0.01, 0.05):
        prediction = StepModel.fit([runs([100], noise=noise), runs([400], noise=noise)]).predict(900, 1)
        assert prediction.low < truth < prediction.high
        widths.append(prediction.high - prediction.low)
    assert widths[0] < widths[1]


def test_a_curve_is_told_as_a_bad_fit() -> None:
    model = StepModel.fit([runs([length], curve=0.001) for length in (50, 200, 400)])
    assert "bad fit" in model.predict(450, 1).warnings[0]


def test_what_was_not_run_is_told() -> None:
    model = StepModel.fit([runs([100]), runs([200])])
    assert model.predict(300, 1).warnings == ()
    assert [warning.partition(":")[0] for warning in model.predict(900, 1).warnings] == ["far"]
    assert "batch 2 was not run" in model.predict(100, 2).warnings


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        ([runs([100])[:2], runs([400])[:2]], "2 runs with decode steps, a prediction needs at least 3"),
        ([runs([100]), runs([110])], "100 to 129 tokens in the cache, a prediction needs lengths at least 1.5 times"),
        ([[replace(run([5], 2), itl_ms=())] * 5], "0 runs with decode steps"),
    ],
)
def test_too_little_to_tell_is_refused(cases: list[list[RunTimes]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        StepModel.fit(cases)
