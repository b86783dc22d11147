"""Continuations of a context: their probabilities, and contexts that leave no room."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from quantization.continuations import score_continuations
from quantization.scored_package import ScoredPackage
from runtime.errors import RequestError

SINGLE_TOKEN = 1e-4
"""Nats: a piece of one token takes another path through attention than one of several. Measured: 5e-6."""

Int64Array = NDArray[np.int64]


@pytest.fixture(scope="module", params=["tiny_fp32", "demo_fp32"])
def package(request: pytest.FixtureRequest) -> ScoredPackage:
    return ScoredPackage(request.getfixturevalue(request.param))


def random_ids(seed: int, *lengths: int) -> list[Int64Array]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 257, length) for length in lengths]


@pytest.mark.parametrize("context_length", [1, 2, 40])
def test_probabilities_are_those_of_the_whole_sequence(package: ScoredPackage, context_length: int) -> None:
    context, *continuations = random_ids(0, context_length, 5, 1, 12, 2)
    scored = score_continuations(package, context, continuations, where="here")
    for ids, continuation in zip(continuations, scored, strict=True):
        expected = package.generator.score(np.concatenate([context, ids]))[-len(ids) :]
        np.testing.assert_allclose(continuation.log_p, expected, rtol=0, atol=SINGLE_TOKEN)


def test_no_continuation_sees_another(package: ScoredPackage) -> None:
    context, first, second = random_ids(1, 20, 9, 9)
    (alone,) = score_continuations(package, context, [second], where="here")
    _, behind = score_continuations(package, context, [first, second], where="here")
    np.testing.assert_array_equal(alone.log_p, behind.log_p)


def test_what_the_model_would_write_is_greedy_at_every_token(package: ScoredPackage) -> None:
    (context,) = random_ids(2, 20)
    written = []
    for _ in range(6):
        (*_, logits) = package.generator.decoder.logits(np.array([*context, *written]))
        written.append(int(logits[-1].argmax()))
    other = [*written[:3], (written[3] + 1) % 257, *written[4:]]
    right, wrong = score_continuations(package, context, [np.array(written), np.array(other)], where="here")
    assert right.greedy.tolist() == [True] * 6
    assert wrong.greedy.tolist()[:4] == [True, True, True, False]


def test_a_context_without_room_keeps_its_end(package: ScoredPackage) -> None:
    n_ctx = package.generator.config.n_ctx
    context, *continuations = random_ids(3, n_ctx + 30, 4, 7)
    scored = score_continuations(package, context, continuations, where="here")
    kept = context[-(n_ctx - 6) :]  # the last of 7 is not run
    for ids, continuation in zip(continuations, scored, strict=True):
        (alone,) = score_continuations(package, kept, [ids], where="here")
        np.testing.assert_array_equal(continuation.log_p, alone.log_p)


def test_a_continuation_may_fill_the_context_and_no_more(package: ScoredPackage) -> None:
    n_ctx = package.generator.config.n_ctx
    context, fills, longer = random_ids(4, 3, n_ctx, n_ctx + 1)
    (scored,) = score_continuations(package, context, [fills], where="line 7")
    assert len(scored.log_p) == n_ctx
    with pytest.raises(RequestError, match=f"line 7: {n_ctx + 1} tokens to score do not fit the context of .*{n_ctx};"):
        score_continuations(package, context, [longer], where="line 7")
