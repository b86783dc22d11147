"""How well packages predict a text, and how far their predictions are from a reference's.

The text is cut into windows of tokens, each run from an empty cache. A window's first token is context and is never
scored; of a window that overlaps the one before it, the tokens that are new are scored. Windows that do not overlap
thus score all but their first token: windows of 512 give 511 predictions each.

Whatever the text's length, no more logits stand in memory than one piece of each package; of each token, 32 bytes are
kept for a package, and 24 for all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime.errors import RequestError
from runtime.tokenizer import Tokenizer

from .divergence import Float64Array, kl_of_log_probabilities, log_softmax, rank_of_first_choice
from .scored_package import Int64Array, Progress, ScoredPackage
from .standard_error import Estimate, clustered_mean

PERCENTILES = (1, 5, 50, 95, 99)
"""Of the change of the true token's probability. llama.cpp's perplexity tool reports the same."""

TOP = 5
"""`top5` asks whether a package's first choice is among so many of the reference's."""

ROWS = 8
"""Predictions that are compared at a time: their float64 stay in the processor's cache. Two packages of 50,257 tokens
take 0.28 ms a prediction, in pieces of 128 0.75 ms."""


CHARACTERS_AT_ONCE = 1 << 18
"""Of a text that is being encoded: the tokenizers library takes some 150 times its size meanwhile."""

WORD_GAP = re.compile("(?<=[A-Za-z0-9]) (?=[A-Za-z0-9])")
"""Where GPT-2's tokenizer always begins a new token, with the space."""


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [start, stop) of a text are run together; those from `first_scored` on are scored."""

    start: int
    first_scored: int
    stop: int

    @property
    def n_scored(self) -> int:
        return self.stop - self.first_scored


@dataclass(frozen=True, slots=True)
class ScoredText:
    """How much was scored: the scored tokens, the bytes that they spell, the words that begin in them."""

    tokens: int
    words: int  # separated by ASCII whitespace
    bytes_scored: int
    windows: int


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a package is from the reference, at each scored token."""

    kl: Float64Array  # [N], nats, KL(reference || package)
    rank: Int64Array  # [N], of the package's first choice by the reference, 0 where both agree
    reference_log_p: Float64Array  # [N]


@dataclass(frozen=True, slots=True)
class TextScores:
    """What a package gave each scored token of a text."""

    log_p: Float64Array  # [N], natural log-probability of the true token
    divergence: Divergence | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextQuality:
    """The figures of one package. Standard errors take windows as independent; None where there is only one.

    The comparison is None without a reference: `top1` is the share of tokens at which both have the same first choice,
    `top5` the share at which the package's first choice is among the reference's five, `perplexity_change` in percent,
    `probability_change` percentiles of the true token's probability less that by the reference, in percentage points.
    """

    perplexity: float
    standard_error: float | None
    word_perplexity: float | None  # None where no word begins in what was scored
    bits_per_byte: float
    kl: float | None = None
    kl_standard_error: float | None = None
    top1: float | None = None
    top5: float | None = None
    perplexity_change: float | None = None
    perplexity_change_standard_error: float | None = None
    probability_change: dict[str, float] | None = None


def encode_text(tokenizer: Tokenizer, text: str) -> Int64Array:
    """`Tokenizer.encode` of a long text, in less memory; the same ids [T], the same errors."""
    ids, start = [np.empty(0, np.int64)], 0
    while start < len(text):
        gap = WORD_GAP.search(text, start + CHARACTERS_AT_ONCE)
        stop = gap.start() if gap else len(text)
        ids.append(tokenizer.encode(text[start:stop]))
        start = stop
    return np.concatenate(ids)


def judge_text(
    packages: Sequence[ScoredPackage],
    ids: Int64Array,
    *,
    window: int,
    stride: int,
    reference: ScoredPackage | None = None,
    progress: Progress,
) -> tuple[ScoredText, list[TextQuality]]:
    """What each package is worth on a text [T], and how much of it was scored; see `cut_windows` and `score_text`."""
    windows = cut_windows(len(ids), window=window, stride=stride)
    scored = count_scored(ids, windows, packages[0].generator.tokenizer)
    scores = score_text(packages, ids, windows, reference=reference, progress=progress)
    return scored, [summarize(each, windows, scored) for each in scores]


def cut_windows(n_tokens: int, *, window: int, stride: int) -> list[Window]:
    """Cut a text into windows that begin `stride` tokens apart; the last one may be shorter.

    Args:
        n_tokens: of the text.
        window: tokens that are run together, 2 or more.
        stride: 1 to `window`.
    Raises:
        RequestError: a number is out of range, or the text is shorter than one window.
    """
    if window < 2:
        raise RequestError(f"a window of {window} tokens has nothing to predict, expected 2 or more")
    if not 1 <= stride <= window:
        raise RequestError(f"stride {stride} would leave tokens out or stand still, expected 1 to the window, {window}")
    if n_tokens < window:
        raise RequestError(f"the text has {n_tokens} tokens, less than one window of {window}; take a smaller --window")
    windows: list[Window] = []
    scored_until = 0
    for start in range(0, n_tokens, stride):
        stop = min(start + window, n_tokens)
        first_scored = max(scored_until, start + 1)
        if first_scored >= stop:
            break
        windows.append(Window(start, first_scored, stop))
        scored_until = stop
    return windows


def count_scored(ids: Int64Array, windows: Sequence[Window], tokenizer: Tokenizer) -> ScoredText:
    """Count what the windows score of a text's tokens [T]."""
    bytes_of_id = np.array([len(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.n_vocab)])
    lengths = bytes_of_id[ids]
    text = b"".join(map(tokenizer.token_bytes, ids.tolist()))
    word_starts = np.fromiter((word.start() for word in re.finditer(rb"\S+", text)), np.int64)
    token_of_word = np.searchsorted(np.cumsum(lengths), word_starts, side="right")
    scored = np.zeros(len(ids), np.bool_)
    for window in windows:
        scored[window.first_scored : window.stop] = True
    return ScoredText(
        tokens=int(scored.sum()),
        words=int(scored[token_of_word].sum()),
        bytes_scored=int(lengths[scored].sum()),
        windows=len(windows),
    )


def score_text(
    packages: Sequence[ScoredPackage],
    ids: Int64Array,
    windows: Sequence[Window],
    *,
    reference: ScoredPackage | None = None,
    progress: Progress,
) -> list[TextScores]:
    """Run packages over a text side by side, and hold each against the reference if there is one.

    Args:
        packages: all of one tokenizer; the reference may be one of them.
        ids: [T] int64, the text.
        windows: of these ids, none longer than a package's context.
        reference: the package whose predictions are taken as given.
        progress: called after each window.
    Returns:
        The scores of each package.
    Raises:
        PackageError: a package gives logits that are no numbers.
    """
    n_scored = sum(window.n_scored for window in windows)
    results = [_empty_scores(n_scored, compared=reference is not None) for _ in packages]
    distinct = list(dict.fromkeys([*([reference] if reference else []), *packages]))  # each is run once
    done = 0
    for number, window in enumerate(windows, start=1):
        for targets, log_p in _predictions(distinct, ids, window):
            place = slice(done, done + len(targets))
            for package, scores in zip(packages, results, strict=True):
                _write_scores(scores, place, targets, log_p[distinct.index(package)], expected=log_p[0])
            done = place.stop
        progress("windows", number, len(windows))
    return results


def _empty_scores(n_scored: int, *, compared: bool) -> TextScores:
    divergence = Divergence(np.empty(n_scored), np.empty(n_scored, np.int64), np.empty(n_scored)) if compared else None
    return TextScores(np.empty(n_scored), divergence)


def _predictions(
    packages: Sequence[ScoredPackage], ids: Int64Array, window: Window
) -> Iterator[tuple[Int64Array, list[Float64Array]]]:
    """The scored tokens [S] of a window, a few at a time, and each package's log-probabilities [S, V] for them."""
    where = f"tokens {window.start:,} to {window.stop - 1:,} of the text"
    streams = [package.logits(ids[window.start : window.stop - 1], where=where) for package in packages]
    first = window.start + 1  # the token that a piece's first logits are about
    for pieces in zip(*streams, strict=True):
        for token in range(max(first, window.first_scored), first + len(pieces[0]), ROWS):
            rows = slice(token - first, token - first + ROWS)
            logits = [piece[rows] for piece in pieces]
            yield ids[token : token + len(logits[0])], [log_softmax(each) for each in logits]
        first += len(pieces[0])


def _write_scores(
    scores: TextScores, place: slice, targets: Int64Array, log_p: Float64Array, *, expected: Float64Array
) -> None:
    """Turn the log-probabilities [S, V] of a piece, and the reference's, into scores of its S tokens."""
    each = np.arange(len(targets))
    scores.log_p[place] = log_p[each, targets]
    if scores.divergence is not None:
        scores.divergence.kl[place] = kl_of_log_probabilities(expected, log_p)
        scores.divergence.rank[place] = rank_of_first_choice(expected, log_p)
        scores.divergence.reference_log_p[place] = expected[each, targets]


def summarize(scores: TextScores, windows: Sequence[Window], text: ScoredText) -> TextQuality:
    """Turn the scores of single tokens into figures of the text."""
    sizes = np.array([window.n_scored for window in windows])
    nats = clustered_mean(-scores.log_p, sizes)
    total_nats = nats.mean * text.tokens
    perplexity = nats.exponential()
    quality = TextQuality(
        perplexity=perplexity.mean,
        standard_error=perplexity.standard_error,
        word_perplexity=Estimate(total_nats / text.words, None).exponential().mean if text.words else None,
        bits_per_byte=total_nats / math.log(2) / text.bytes_scored,
    )
    return quality if scores.divergence is None else _compared(quality, scores.log_p, scores.divergence, sizes)


def _compared(quality: TextQuality, log_p: Float64Array, divergence: Divergence, sizes: Int64Array) -> TextQuality:
    kl = clustered_mean(divergence.kl, sizes)
    # of the differences, token by token: what both find hard cancels out, and a small change shows in a short text
    ratio = clustered_mean(divergence.reference_log_p - log_p, sizes).exponential()
    change = 100 * (np.exp(log_p) - np.exp(divergence.reference_log_p))
    return replace(
        quality,
        kl=kl.mean,
        kl_standard_error=kl.standard_error,
        top1=float((divergence.rank == 0).mean()),
        top5=float((divergence.rank < TOP).mean()),
        perplexity_change=100 * (ratio.mean - 1),
        perplexity_change_standard_error=None if ratio.standard_error is None else 100 * ratio.standard_error,
        probability_change=dict(
            zip((f"p{percent}" for percent in PERCENTILES), np.percentile(change, PERCENTILES).tolist(), strict=True)
        ),
    )
