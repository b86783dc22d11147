"""Making up for what earlier layers lost: the minimum it promises, and when there is nothing to make up for."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from quantization import drift
from quantization.drift import DAMPING, made_up_for
from runtime.errors import QuantizationError

Float32Array = NDArray[np.float32]

LEFT = 0.2
"""Of the products' squared error on other tokens, what is left. Measured: 0.022."""

FLAT = 1e-5
"""Of the slope at the matrix that was given, what float32 leaves at the minimum. Measured: 2e-6."""


def inputs(n_rows: int, n_columns: int, seed: int) -> Float32Array:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n_rows, n_columns // 2)) @ rng.standard_normal((n_columns // 2, n_columns))
    return (mixed + 0.1 * rng.standard_normal(mixed.shape)).astype(np.float32)


def squares(of: Float32Array) -> Float32Array:
    result: Float32Array = of.T @ of
    return result


def random(*shape: int, seed: int = 0) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_where_nothing_was_lost_the_matrix_stays() -> None:
    exact, weight = inputs(100, 12, 0), random(12, 7)
    np.testing.assert_array_equal(made_up_for(weight, exact, exact, squares(exact)), weight)
    np.testing.assert_array_equal(
        made_up_for(weight, exact, exact, squares(exact), np.zeros((100, 7), np.float32)), weight
    )


def test_inputs_of_zeros_tell_nothing() -> None:
    nothing, weight = np.zeros((20, 5), np.float32), random(5, 3)
    np.testing.assert_array_equal(made_up_for(weight, inputs(20, 5, 0), nothing, squares(nothing)), weight)


@pytest.mark.parametrize("lacks", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_minimum(seed: int, lacks: bool) -> None:
    """A sum of squares has one place without a slope."""
    exact, weight = inputs(80, 10, seed), random(10, 6, seed=seed)
    rough = exact + np.float32(0.2) * random(80, 10, seed=seed + 100)
    missing = random(80, 6, seed=seed + 200) if lacks else None
    pull = DAMPING * float(np.diag(squares(rough)).mean())

    def slope(matrix: Float32Array) -> float:
        off = rough.astype(np.float64) @ matrix - exact.astype(np.float64) @ weight - (missing if lacks else 0)
        return float(np.abs(rough.T @ off + pull * (matrix - weight)).max())

    assert slope(made_up_for(weight, exact, rough, squares(rough), missing)) <= FLAT * slope(weight)


def test_it_serves_tokens_that_it_never_saw() -> None:
    weight = random(40, 20)
    losing = np.eye(40, dtype=np.float32) + np.float32(0.02) * random(40, 40, seed=7)  # what the layers before do
    tokens = inputs(2500, 40, 0)
    seen, others = tokens[:2000], tokens[2000:]
    rough = seen @ losing
    fitted = made_up_for(weight, seen, rough, squares(rough))
    before, after = (float(np.square(others @ weight - others @ losing @ matrix).sum()) for matrix in (weight, fitted))
    assert after <= LEFT * before


def test_hardly_damped_it_undoes_what_can_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "DAMPING", 1e-6)
    exact, weight = random(300, 8), random(8, 5, seed=1)
    losing = np.eye(8, dtype=np.float32) + np.float32(0.1) * random(8, 8, seed=2)
    rough = exact @ losing
    np.testing.assert_allclose(
        made_up_for(weight, exact, rough, squares(rough)), np.linalg.inv(losing) @ weight, rtol=0, atol=1e-3
    )


def test_inputs_that_are_not_finite_are_refused() -> None:
    exact = inputs(20, 4, 0)
    exact[3, 2] = np.inf
    with np.errstate(invalid="ignore"), pytest.raises(QuantizationError, match="inputs that are not finite"):
        made_up_for(random(4, 3), exact, exact, squares(exact))
