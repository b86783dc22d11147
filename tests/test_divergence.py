"""How far two models' predictions are apart: facts by hand, laws over many logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from quantization.divergence import kl_divergence, log_softmax, rank_of_first_choice, top1_agreement

ROUNDING = 1e-11
"""Nats that float64 may lose over 20 logits of up to 1e4, which have 2e-12 themselves. Measured: 8e-16."""

LOGITS = hnp.arrays(np.float32, (3, 20), elements=st.floats(-1e4, 1e4, width=32))


def of_probabilities(*rows: list[float]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = np.log(np.array(rows)).astype(np.float32)
    return logits


def test_known_divergences() -> None:
    reference = of_probabilities([0.5, 0.5], [0.75, 0.25])
    model = of_probabilities([0.75, 0.25], [0.5, 0.5])
    expected = [0.5 * math.log(4 / 3), 0.75 * math.log(1.5) - 0.25 * math.log(2)]
    assert kl_divergence(reference, model).tolist() == pytest.approx(expected, rel=1e-6)  # of the float32 logits


@given(LOGITS)
@settings(deadline=None)
def test_probabilities_add_up_to_1(logits: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(np.exp(log_softmax(logits)).sum(axis=-1), 1, rtol=0, atol=ROUNDING)


@given(LOGITS, LOGITS)
@settings(deadline=None)
def test_a_divergence_is_finite_and_not_negative(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> None:
    divergence = kl_divergence(reference, logits)
    assert divergence.shape == (3,)
    assert np.isfinite(divergence).all()
    assert divergence.min() >= -ROUNDING


@given(LOGITS, st.integers(-1000, 1000))
@settings(deadline=None)
def test_a_shift_of_all_logits_changes_nothing(logits: NDArray[np.float32], shift: int) -> None:
    rounded = np.rint(logits)  # so that the shift itself is exact
    assert np.abs(kl_divergence(rounded, rounded + np.float32(shift))).max() <= ROUNDING


def test_the_logits_are_left_as_they_are() -> None:
    logits = of_probabilities([0.75, 0.25])
    before = logits.copy()
    kl_divergence(logits, logits)
    np.testing.assert_array_equal(logits, before)


def test_nan_comes_through() -> None:
    logits = of_probabilities([0.75, 0.25])
    assert np.isnan(kl_divergence(logits, logits * np.float32(np.nan))).all()


def test_top1_counts_equal_first_ranks() -> None:
    reference = of_probabilities([0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.1, 0.9])
    model = of_probabilities([0.9, 0.1], [0.4, 0.6], [0.4, 0.6], [0.2, 0.8])
    assert top1_agreement(reference, model) == 0.75


def test_the_rank_of_a_first_choice_counts_what_the_reference_puts_before_it() -> None:
    reference = log_softmax(of_probabilities([0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.3, 0.3, 0.4]))
    model = log_softmax(of_probabilities([0.9, 0.05, 0.05], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.6, 0.3, 0.1]))
    assert rank_of_first_choice(reference, model).tolist() == [0, 1, 2, 1]
