"""How probable tokens were: the one that was chosen, and the most probable ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .truncation import rank_largest

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TokenLogProbability:
    """A token's natural log-probability, and those of the most probable tokens at its place, the first first."""

    token_id: int
    log_probability: float  # -inf where the token was not to be chosen
    top: tuple[tuple[int, float], ...]  # (token id, log-probability); fewer where no more could be chosen


def log_probabilities(logits: Float32Array, token_id: int, *, top: int = 0) -> TokenLogProbability:
    """Log-probabilities of a token and of the `top` most probable ones, equal ones by id, the lower first.

    Of the logits as the model gave them (transformers' `output_logits`), these are the `logprobs` of OpenAI's API. Of
    `sampling.warp_logits(processed, options)` (transformers' `output_scores`), they say what the token was drawn from,
    and are -inf for what the options left out.

    Args:
        logits: [V] float32, at least one of them finite, none NaN or +inf.
        token_id: 0 to V - 1.
        top: how many; all of them where there are fewer.
    """
    normalizer = log_normalizer(logits)
    ranked = rank_largest(logits, min(top, logits.size)).tolist() if top else []
    most_probable = tuple((other, float(logits[other]) - normalizer) for other in ranked if logits[other] > -np.inf)
    return TokenLogProbability(token_id, float(logits[token_id]) - normalizer, most_probable)


def log_normalizer(logits: Float32Array) -> float:
    """log(sum(exp(logits))), summed in float64: what to take from a logit to make it a log-probability."""
    peak = float(logits.max())
    return peak + float(np.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))
