"""LAMBADA: can a package tell the last word of a passage that a reader could guess?

Two ways of counting are in use, and both are reported. `accuracy` asks that every token of the last word, the space
before it included, be the most probable one; `perplexity` is exp(-mean over words of the word's log-probability).
This is what EleutherAI's lm-evaluation-harness reports (its task lambada_openai). `last_token_accuracy` asks for the
word's last token only, those before it being given: easier, and evidently what OpenAI's paper counted. Of 124M the
paper says 45.99%, at a perplexity of 35.13; others found 46.7% to 46.9% by the last token, the harness 32.6% by the
word, at 40.1.

Sources: lm_eval/tasks/lambada/lambada_openai.yaml and issues 350, 356 and 2159 of EleutherAI/lm-evaluation-harness;
issue 13761 of huggingface/transformers; issue 131 of openai/gpt-2, as issue 75 of EleutherAI/gpt-neo quotes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .continuations import score_continuations
from .datasets import LastWord
from .scored_package import Progress, ScoredPackage
from .standard_error import clustered_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class LambadaQuality:
    """The figures of one package; accuracies are shares, 0 to 1. Standard errors take passages as independent."""

    passages: int
    accuracy: float
    accuracy_standard_error: float | None
    last_token_accuracy: float
    perplexity: float  # of a word
    standard_error: float | None  # of the perplexity


def score_lambada(package: ScoredPackage, passages: Sequence[LastWord], *, progress: Progress) -> LambadaQuality:
    """Have a package predict each passage's last word; a passage that is too long keeps its end.

    Args:
        package: the model.
        passages: at least one.
        progress: called after each.
    Raises:
        TokenizerError: a passage has a byte that the vocabulary cannot spell.
        RequestError, PackageError: as `score_continuations`.
    """
    encode = package.generator.tokenizer.encode
    scored = []
    for number, passage in enumerate(passages, start=1):
        word = encode(f" {passage.word}")
        scored += score_continuations(package, encode(passage.context), [word], where=f"line {passage.line}")
        progress("passages", number, len(passages))
    each = np.ones(len(scored), np.int64)
    accuracy = clustered_mean([continuation.greedy.all() for continuation in scored], each)
    perplexity = clustered_mean([-continuation.log_p.sum() for continuation in scored], each).exponential()
    return LambadaQuality(
        passages=len(passages),
        accuracy=accuracy.mean,
        accuracy_standard_error=accuracy.standard_error,
        last_token_accuracy=float(np.mean([continuation.greedy[-1] for continuation in scored])),
        perplexity=perplexity.mean,
        standard_error=perplexity.standard_error,
    )
