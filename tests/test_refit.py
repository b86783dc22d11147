"""Scales fitted to known codes: the minimum it promises, and what it leaves as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from quantization import refit
from quantization.gptq import DAMPING, damped, round_compensated
from quantization.grid import Grid, searched_grid
from quantization.refit import refitted
from tests.test_gptq import correlated_inputs, product_error

Float32Array = NDArray[np.float32]


def points(grid: Grid, codes: Float32Array) -> Float32Array:
    weight: Float32Array = codes * np.repeat(grid.scale, grid.group, axis=0)[: len(codes)]
    return weight


class Rounded:
    """A matrix [70, 33] in groups of 32, rounded for inputs that hang together."""

    def __init__(self, seed: int) -> None:
        self.weight = np.random.default_rng(seed).standard_normal((70, 33), dtype=np.float32)
        self.inputs = correlated_inputs(200, 70, seed)
        self.hessian: Float32Array = self.inputs.T @ self.inputs
        self.grid = searched_grid(self.weight, bits=4, group=32, importance=np.diag(self.hessian))
        self.codes = self.grid.codes(round_compensated(self.weight, self.hessian, self.grid))

    def refitted(self) -> Grid:
        return refitted(self.grid, self.weight, self.codes, self.hessian, damping=DAMPING)

    def cost(self, grid: Grid) -> NDArray[np.float64]:
        """Of each column, what the fit is to make least, but for the pull towards the scales as they were."""
        off = points(grid, self.codes).astype(np.float64) - self.weight
        result: NDArray[np.float64] = (off * (damped(self.hessian, DAMPING) @ off)).sum(axis=0)
        return result


@pytest.mark.parametrize("seed", range(8))
def test_products_come_closer(seed: int) -> None:
    made = Rounded(seed)
    grid = made.refitted()
    assert (made.cost(grid) <= made.cost(made.grid)).all()
    before, after = (product_error(made.inputs, made.weight, points(g, made.codes)) for g in (made.grid, grid))
    assert after < before


def test_without_a_pull_no_other_scales_do_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "PULL", 0.0)
    made = Rounded(0)
    grid, rng = made.refitted(), np.random.default_rng(0)
    for _ in range(50):
        other = replace(grid, scale=grid.scale * (1 + 0.01 * rng.standard_normal(grid.scale.shape)).astype(np.float32))
        assert (made.cost(other) >= made.cost(grid) * (1 - 1e-6)).all()


def test_codes_stay_codes() -> None:
    made = Rounded(3)
    grid = made.refitted()
    np.testing.assert_array_equal(grid.codes(points(grid, made.codes)), made.codes)


def test_groups_of_zeros_keep_their_scale() -> None:
    made = Rounded(1)
    made.codes[:32] = 0
    made.codes[:, 5] = 0
    scale = made.refitted().scale
    np.testing.assert_allclose(scale[0], made.grid.scale[0], rtol=1e-5)
    np.testing.assert_allclose(scale[:, 5], made.grid.scale[:, 5], rtol=1e-5)
    assert not np.allclose(scale[1], made.grid.scale[1], rtol=1e-5)


def test_columns_may_be_taken_in_any_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Rounded(2)
    whole = made.refitted().scale
    monkeypatch.setattr(refit, "COLUMNS_PER_STEP", 7)
    np.testing.assert_allclose(made.refitted().scale, whole, rtol=1e-4)


@pytest.mark.parametrize("n_inputs", [0, 1])
def test_few_inputs_will_do(n_inputs: int) -> None:
    made = Rounded(4)
    few = made.inputs[:n_inputs]
    assert np.isfinite(refitted(made.grid, made.weight, made.codes, few.T @ few, damping=DAMPING).scale).all()
