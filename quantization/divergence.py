"""How far one model's predictions are from another's, token by token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]


def log_softmax(logits: Float32Array) -> Float64Array:
    """Natural log-probabilities [T, V] float64 of logits [T, V]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def kl_divergence(reference: Float32Array, logits: Float32Array) -> Float64Array:
    """KL(reference || model) at each position, in nats.

    Args:
        reference: [T, V] float32 logits of the reference, p.
        logits: [T, V] float32 logits of the model, q.
    Returns:
        [T] float64, 0 where the two agree.
    """
    return kl_of_log_probabilities(log_softmax(reference), log_softmax(logits))


def kl_of_log_probabilities(reference: Float64Array, model: Float64Array) -> Float64Array:
    """The same of natural log-probabilities [T, V] float64, for who has them already.

    sum over v of p(v) (ln p(v) - ln q(v))

    Source: Kullback and Leibler, On Information and Sufficiency (1951).
    """
    result: Float64Array = (np.exp(reference) * (reference - model)).sum(axis=-1)
    return result


def rank_of_first_choice(reference: Float64Array, model: Float64Array) -> NDArray[np.int64]:
    """How many tokens the reference ranks before the model's first choice, at each position; 0 where the two agree.

    Args:
        reference: [T, V], logits or log-probabilities.
        model: [T, V], likewise.
    Returns:
        [T] int64, 0 to V - 1.
    """
    chosen = np.take_along_axis(reference, model.argmax(axis=-1)[:, None], axis=-1)  # [T, 1]
    rank: NDArray[np.int64] = (reference > chosen).sum(axis=-1)
    return rank


def top1_agreement(reference: Float32Array, logits: Float32Array) -> float:
    """Share of positions, 0 to 1, at which both rank the same token first; logits [T, V]."""
    return float((reference.argmax(axis=-1) == logits.argmax(axis=-1)).mean())
