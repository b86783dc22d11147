"""How probable a package finds each of several ways in which a text may go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.decoder import Decoding
from runtime.errors import RequestError

from .divergence import Float64Array, log_softmax
from .scored_package import Int64Array, ScoredPackage


@dataclass(frozen=True, slots=True)
class Continuation:
    """What the package gave each token of a continuation, all before it being there."""

    log_p: Float64Array  # [T], natural log-probability
    greedy: NDArray[np.bool_]  # [T], whether it is the most probable token


def score_continuations(
    package: ScoredPackage, context: Int64Array, continuations: Sequence[Int64Array], *, where: str
) -> list[Continuation]:
    """Run a context once, and each continuation behind it.

    A context that leaves no room for the longest continuation keeps its end.

    Args:
        package: the model.
        context: [P] int64, P >= 1.
        continuations: [T] int64 each, T >= 1.
        where: what this is, for messages.
    Raises:
        RequestError: a continuation alone fills the model's context.
        PackageError: the package gives logits that are no numbers.
    """
    decoder = package.generator.decoder
    longest = max(map(len, continuations))
    room = decoder.config.n_ctx - (longest - 1)  # a last token is predicted, not run
    if room < 1:
        raise RequestError(
            f"{where}: {longest} tokens to score do not fit the context of {package.folder}, which has "
            f"{decoder.config.n_ctx}; leave it out"
        )
    context = context[-room:]
    decoding = decoder.start(batch=1, capacity=len(context) + longest - 1)
    for logits in package.watched(decoding.append(0, context, last_only=True), n_tokens=len(context), where=where):
        after_context = log_softmax(logits[-1:])  # [1, V]
    scored = []
    for ids in continuations:
        decoding.cache.lengths[:] = len(context)  # back to the context's end: what stands behind it is overwritten
        scored.append(_score(package, decoding, after_context, ids, where))
    return scored


def _score(
    package: ScoredPackage, decoding: Decoding, after_context: Float64Array, ids: Int64Array, where: str
) -> Continuation:
    log_p, greedy = np.empty(len(ids)), np.empty(len(ids), np.bool_)

    def write(start: int, predictions: Float64Array) -> int:
        """Score the tokens from `start` on by predictions [S, V]; where they end."""
        targets = ids[start : start + len(predictions)]
        place = slice(start, start + len(targets))
        log_p[place] = predictions[np.arange(len(targets)), targets]
        greedy[place] = predictions.argmax(axis=-1) == targets
        return place.stop

    done = write(0, after_context)
    if len(ids) > 1:
        for logits in package.watched(decoding.append(0, ids[:-1]), n_tokens=len(ids) - 1, where=where):
            done = write(done, log_softmax(logits))
    return Continuation(log_p, greedy)
