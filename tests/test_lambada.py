"""LAMBADA by hand: figures that follow from the runtime's own scores and its greedy choice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantization.datasets import LastWord
from quantization.lambada import score_lambada
from quantization.scored_package import ScoredPackage
from runtime.sampling import SamplingOptions

CONTEXTS = (
    "He sat down and looked at the",
    "“I do not know,” said",
    "In the morning the old man went to the",
    "He was",
)
LONGER_WORD = "extraordinarily"


@pytest.fixture(scope="module")
def demo(demo_fp32: Path) -> ScoredPackage:
    return ScoredPackage(demo_fp32)


def what_it_would_write(package: ScoredPackage, context: str) -> str:
    """The model's own next token, which begins a word in these places."""
    written = package.generator.generate(context, max_new_tokens=1, sampling=SamplingOptions.greedy()).text
    assert written.startswith(" ")
    return written[1:]


def test_accuracy_is_the_share_of_words_that_it_would_write(demo: ScoredPackage) -> None:
    words = [what_it_would_write(demo, context) for context in CONTEXTS[:3]]
    passages = [LastWord(i, context, word) for i, (context, word) in enumerate(zip(CONTEXTS, words, strict=False))]
    quality = score_lambada(demo, [*passages, LastWord(4, CONTEXTS[3], LONGER_WORD)], progress=lambda *_: None)
    assert (quality.passages, quality.accuracy) == (4, 0.75)
    assert quality.accuracy_standard_error == pytest.approx(np.sqrt(0.75 * 0.25 / 3))


def test_perplexity_is_of_whole_words_and_follows_from_the_runtimes_scores(demo: ScoredPackage) -> None:
    passages = [LastWord(i, context, LONGER_WORD) for i, context in enumerate(CONTEXTS)]
    encode = demo.generator.tokenizer.encode
    n_tokens = len(encode(f" {LONGER_WORD}"))
    assert n_tokens > 1
    sums = [demo.generator.score(encode(f"{p.context} {p.word}"))[-n_tokens:].sum() for p in passages]
    quality = score_lambada(demo, passages, progress=lambda *_: None)
    assert quality.perplexity == pytest.approx(np.exp(-np.mean(sums)), rel=1e-4)
    assert quality.standard_error == pytest.approx(quality.perplexity * np.std(sums, ddof=1) / 2, rel=1e-3)


def test_the_last_token_may_be_right_where_the_word_is_not(demo: ScoredPackage) -> None:
    """The word is a surprise, but not how it ends."""
    context, stem = CONTEXTS[0], "Elizabe"
    ending = demo.generator.generate(f"{context} {stem}", max_new_tokens=1, sampling=SamplingOptions.greedy()).text
    assert " " not in ending
    quality = score_lambada(demo, [LastWord(1, context, stem + ending)], progress=lambda *_: None)
    assert (quality.accuracy, quality.last_token_accuracy, quality.standard_error) == (0, 1, None)
