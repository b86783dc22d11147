"""Log-probabilities: laws, and what is left out of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from runtime.log_probabilities import log_normalizer, log_probabilities
from runtime.sampling import SamplingOptions, warp_logits

ERROR = 1e-6
"""Of a log-probability against float64. Measured: 2e-7."""

RANDOM = np.random.default_rng(0).normal(scale=4, size=5000).astype(np.float32)


def test_they_are_the_softmax() -> None:
    exact = RANDOM.astype(np.float64) - np.log(np.exp(RANDOM.astype(np.float64)).sum())
    given = log_probabilities(RANDOM, 17, top=5000)
    assert (given.token_id, given.log_probability) == (17, pytest.approx(exact[17], abs=ERROR))
    assert [token for token, _ in given.top] == np.argsort(-exact).tolist()
    np.testing.assert_allclose([value for _, value in given.top], np.sort(exact)[::-1], atol=ERROR)


@pytest.mark.parametrize("shift", [-1e4, 1e4, 3e38])
def test_huge_logits_do_not_overflow(shift: float) -> None:
    logits = np.array([shift, shift], np.float32)
    assert log_normalizer(logits) == pytest.approx(float(np.float32(shift)) + math.log(2))


def test_equals_come_by_id_and_no_more_than_there_are() -> None:
    given = log_probabilities(np.zeros(3, np.float32), 1, top=9)
    assert [token for token, _ in given.top] == [0, 1, 2]


def test_what_the_options_leave_out_has_no_probability() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    given = log_probabilities(warp_logits(logits, SamplingOptions(top_k=2)), 2, top=3)
    assert given.log_probability == -math.inf
    assert [token for token, _ in given.top] == [0, 1]
    assert math.exp(given.top[0][1]) == pytest.approx(0.5 / 0.8)


def test_none_is_asked_for() -> None:
    assert log_probabilities(RANDOM, 3).top == ()
