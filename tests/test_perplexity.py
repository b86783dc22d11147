"""Windows over a text, what they score, and the figures that come of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.checkpoint import canonical_shapes
from quantization.perplexity import (
    CHARACTERS_AT_ONCE,
    TextQuality,
    TextScores,
    Window,
    count_scored,
    cut_windows,
    encode_text,
    score_text,
    summarize,
)
from quantization.scored_package import ScoredPackage
from runtime.errors import PackageError, RequestError
from runtime.package import MODEL_FILES, TOKENIZER, WEIGHTS_SUFFIX
from runtime.tokenizer import Tokenizer

from .conftest import BYTES_AND_END, bytes_checkpoint, converted
from .tiny import tiny_config, write_safetensors_checkpoint

ROUNDING = 5e-6
"""Nats between the ways of adding up float32 logits. Measured: 5e-7."""

TEXT = "It was the best of times, it was the worst of times; it was the age of wisdom.\n\nThe year: 1775, à Paris. " * 2


def quiet(_what: str, _done: int, _total: int) -> None:
    pass


def encoded(package: ScoredPackage, text: str = TEXT) -> NDArray[np.int64]:
    return package.generator.tokenizer.encode(text)


def scored(package: ScoredPackage, ids: NDArray[np.int64], windows: list[Window]) -> TextScores:
    return score_text([package], ids, windows, progress=quiet)[0]


def compared(reference: Path, package: Path, *, window: int, stride: int) -> TextQuality:
    held = ScoredPackage(reference)
    other = held if package == reference else ScoredPackage(package)
    ids = encoded(held)
    windows = cut_windows(len(ids), window=window, stride=stride)
    (scores,) = score_text([other], ids, windows, reference=held, progress=quiet)
    return summarize(scores, windows, count_scored(ids, windows, held.generator.tokenizer))


@pytest.fixture(scope="module")
def tiny(tiny_fp32: Path) -> ScoredPackage:
    return ScoredPackage(tiny_fp32)


# Encoding


@pytest.fixture(scope="module")
def demo_tokenizer(demo_fp32: Path) -> Tokenizer:
    return Tokenizer.load(demo_fp32 / TOKENIZER)


@given(st.lists(st.sampled_from(["and", "I", "'s", "7", ".", " ", "  ", "\n", "\t", "é", "\x1c", "\u3000", "—"])))
@settings(deadline=None)
def test_a_text_in_pieces_has_the_same_tokens(demo_tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantization.perplexity.CHARACTERS_AT_ONCE", 3)
        assert encode_text(demo_tokenizer, text).tolist() == demo_tokenizer.encode(text).tolist()


def test_a_long_text_is_cut_between_words(demo_tokenizer: Tokenizer) -> None:
    long = TEXT * 2000
    assert len(long) > CHARACTERS_AT_ONCE
    assert encode_text(demo_tokenizer, long).tolist() == demo_tokenizer.encode(long).tolist()


# Windows


def test_windows_side_by_side_score_all_but_their_first_token() -> None:
    assert cut_windows(10, window=4, stride=4) == [Window(0, 1, 4), Window(4, 5, 8), Window(8, 9, 10)]


def test_windows_that_overlap_score_what_is_new() -> None:
    assert cut_windows(9, window=4, stride=2) == [Window(0, 1, 4), Window(2, 4, 6), Window(4, 6, 8), Window(6, 8, 9)]


def test_a_last_token_alone_has_nothing_before_it_and_is_left_out() -> None:
    assert cut_windows(9, window=4, stride=4)[-1] == Window(4, 5, 8)


@given(st.integers(2, 40), st.integers(1, 40), st.integers(0, 100))
def test_every_token_that_has_one_before_it_is_scored_once(window: int, stride: int, more: int) -> None:
    stride = min(stride, window)
    n_tokens = window + more
    windows = cut_windows(n_tokens, window=window, stride=stride)
    scored = [token for each in windows for token in range(each.first_scored, each.stop)]
    assert scored == sorted(set(scored))
    missing = set(range(n_tokens)).difference(scored)
    assert missing == ({0} if stride < window else set(range(0, n_tokens, window)))
    assert all(each.start < each.first_scored < each.stop <= each.start + window for each in windows)


@pytest.mark.parametrize(
    ("n_tokens", "window", "stride", "complaint"),
    [
        (10, 1, 1, "a window of 1 tokens has nothing to predict"),
        (10, 4, 5, "stride 5 would leave tokens out or stand still, expected 1 to the window, 4"),
        (10, 4, 0, "stride 0 would leave tokens out or stand still"),
        (10, 11, 11, "the text has 10 tokens, less than one window of 11"),
    ],
)
def test_windows_that_make_no_sense_are_refused(n_tokens: int, window: int, stride: int, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        cut_windows(n_tokens, window=window, stride=stride)


# What was scored


def test_words_are_counted_where_they_begin(tiny: ScoredPackage) -> None:
    """Tokens are bytes here. Windows of 4 leave out the bytes 0, 4, 8 and 12: a, e, i and the second byte of ß."""
    text = "ab e\tgh i  ß\n m"
    ids = encoded(tiny, text)
    assert len(ids) == len(text.encode()) == 16
    counted = count_scored(ids, cut_windows(16, window=4, stride=4), tiny.generator.tokenizer)
    assert (counted.tokens, counted.bytes_scored, counted.windows) == (12, 12, 4)
    whole = count_scored(ids, cut_windows(16, window=4, stride=3), tiny.generator.tokenizer)
    assert (whole.tokens, whole.bytes_scored) == (15, 15)
    starts = [text.encode().index(word.encode()) for word in text.split()]
    assert whole.words == sum(start != 0 for start in starts)
    assert counted.words == sum(start % 4 != 0 for start in starts)


def test_what_tokens_spell_is_counted_not_their_number(demo_fp32: Path) -> None:
    package = ScoredPackage(demo_fp32)
    ids = encoded(package)
    counted = count_scored(ids, cut_windows(len(ids), window=8, stride=7), package.generator.tokenizer)
    first = package.generator.tokenizer.token_bytes(int(ids[0]))
    assert counted.tokens == len(ids) - 1 < counted.bytes_scored
    assert counted.bytes_scored == len(TEXT.encode()) - len(first)
    assert counted.words == len(TEXT.split()) - 1


# Scores


@pytest.mark.parametrize("stride", [64, 20, 1])
def test_scores_are_those_of_the_runtime(tiny: ScoredPackage, stride: int) -> None:
    ids = encoded(tiny)
    windows = cut_windows(len(ids), window=64, stride=stride)
    expected = [tiny.generator.score(ids[w.start : w.stop])[-w.n_scored :] for w in windows]
    np.testing.assert_allclose(scored(tiny, ids, windows).log_p, np.concatenate(expected), rtol=0, atol=ROUNDING)


def test_pieces_of_a_long_window_are_put_together_in_order(demo_fp32: Path) -> None:
    package = ScoredPackage(demo_fp32)
    ids = encoded(package, TEXT * 6)
    assert len(ids) > 300  # three pieces
    (window,) = windows = cut_windows(len(ids), window=len(ids), stride=len(ids))
    expected = package.generator.score(ids)
    np.testing.assert_allclose(scored(package, ids, windows).log_p, expected, rtol=0, atol=ROUNDING)
    later = [Window(0, 150, window.stop)]
    np.testing.assert_allclose(scored(package, ids, later).log_p, expected[149:], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("stride", [64, 63, 5])
def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(tmp_path: Path, stride: int) -> None:
    folder = bytes_checkpoint(tmp_path / "blank", n_vocab=BYTES_AND_END)
    config = replace(tiny_config(), n_vocab=BYTES_AND_END, eos_token_id=BYTES_AND_END - 1)
    weights = {name: np.zeros(shape, np.float32) for name, shape in canonical_shapes(config).items()}
    write_safetensors_checkpoint(folder, config, weights)
    package = ScoredPackage(converted(folder, tmp_path, "fp32"))
    ids = encoded(package)
    windows = cut_windows(len(ids), window=64, stride=stride)
    counted = count_scored(ids, windows, package.generator.tokenizer)
    quality = summarize(scored(package, ids, windows), windows, counted)
    assert quality.perplexity == pytest.approx(BYTES_AND_END, rel=1e-12)
    assert quality.standard_error == pytest.approx(0, abs=1e-9)
    assert quality.bits_per_byte == pytest.approx(math.log2(BYTES_AND_END), rel=1e-12)
    assert quality.word_perplexity == pytest.approx(BYTES_AND_END ** (counted.tokens / counted.words), rel=1e-9)


def test_a_text_without_a_word_has_no_perplexity_a_word(tiny: ScoredPackage) -> None:
    ids = encoded(tiny, " \n" * 40)
    windows = cut_windows(len(ids), window=40, stride=40)
    counted = count_scored(ids, windows, tiny.generator.tokenizer)
    assert counted.words == 0
    assert summarize(scored(tiny, ids, windows), windows, counted).word_perplexity is None


# Against a reference


def test_a_package_is_no_way_from_itself(tiny_fp32: Path) -> None:
    quality = compared(tiny_fp32, tiny_fp32, window=64, stride=20)
    assert (quality.kl, quality.kl_standard_error, quality.top1, quality.top5) == (0, 0, 1, 1)
    assert (quality.perplexity_change, quality.perplexity_change_standard_error) == (0, 0)
    assert set((quality.probability_change or {}).values()) == {0}


def test_figures_against_a_reference_are_those_of_their_definitions(tiny_fp32: Path, tiny_int8: Path) -> None:
    quality = compared(tiny_fp32, tiny_int8, window=64, stride=64)
    log_p, log_q, targets = [], [], []
    packages = [ScoredPackage(tiny_fp32), ScoredPackage(tiny_int8)]
    ids = encoded(packages[0])
    for start in range(0, len(ids), 64):
        window = ids[start : start + 64]
        for package, logs in zip(packages, (log_p, log_q), strict=True):
            logits = np.concatenate([x.copy() for x in package.logits(window[:-1], where="")]).astype(np.float64)
            logs.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
        targets.append(window[1:])
    p, q, target = np.concatenate(log_p), np.concatenate(log_q), np.concatenate(targets)
    each = np.arange(len(target))
    assert quality.kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-6)
    assert quality.top1 == np.mean(p.argmax(axis=1) == q.argmax(axis=1)) < 1
    five = np.argsort(p, axis=1)[:, -5:]
    assert quality.top5 == np.mean((five == q.argmax(axis=1)[:, None]).any(axis=1))
    before, after = (np.exp(-x[each, target].mean()) for x in (p, q))
    assert quality.perplexity == pytest.approx(after, rel=1e-6)
    assert quality.perplexity_change == pytest.approx(100 * (after / before - 1), rel=1e-4)
    change = 100 * (np.exp(q) - np.exp(p))[each, target]
    assert quality.probability_change is not None
    assert quality.probability_change["p5"] == pytest.approx(np.percentile(change, 5), rel=1e-5)


def test_the_change_of_perplexity_is_surer_than_the_perplexity(tiny_fp32: Path, tiny_int8: Path) -> None:
    """Its error is of differences, token by token."""
    quality = compared(tiny_fp32, tiny_int8, window=16, stride=16)
    assert quality.standard_error is not None
    assert quality.perplexity_change_standard_error is not None
    assert quality.perplexity_change_standard_error < 100 * quality.standard_error / quality.perplexity / 3


def test_logits_that_are_no_numbers_are_told_with_package_and_place(
    tiny_fp32: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(tiny_fp32)
    weights = folder / (MODEL_FILES["fp32"] + WEIGHTS_SUFFIX)
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    damaged, whole = ScoredPackage(folder), ScoredPackage(tiny_fp32)
    ids = encoded(whole)
    windows = cut_windows(len(ids), window=40, stride=40)
    with pytest.raises(PackageError, match="logits are NaN or infinite in tokens 40 to 79 of the text") as raised:
        score_text([damaged], ids, windows[1:], reference=whole, progress=quiet)
    assert str(raised.value).startswith(f"{folder}: ")


def test_progress_is_told_after_each_window(tiny: ScoredPackage) -> None:
    told: list[tuple[str, int, int]] = []
    ids = encoded(tiny)[:100]
    score_text([tiny], ids, cut_windows(100, window=50, stride=50), progress=lambda *step: told.append(step))
    assert told == [("windows", 1, 2), ("windows", 2, 2)]
