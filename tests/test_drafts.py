"""Drafts: what they guess, that they keep in step with the text, and whom they refuse to draft for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.decoder import Decoder
from runtime.drafts import MATCH_TOKENS, DraftPackage, PromptLookup, check_same_tokenizer
from runtime.errors import RequestError
from runtime.package import TOKENIZER, Package, file_entry, open_package, read_manifest
from runtime.text_generator import open_decoder

IDS = np.random.default_rng(3).integers(0, 8191, 40).tolist()


def greedy(ids: Sequence[int], logits: NDArray[np.float32]) -> int:
    return int(np.argmax(logits))


@pytest.fixture(scope="module")
def fp32(demo_fp32: Path) -> Decoder:
    return open_decoder(open_package(demo_fp32))


def written(decoder: Decoder, ids: Sequence[int], tokens: int) -> list[int]:
    """What the model writes behind ids by itself."""
    decoding = decoder.start(batch=1, capacity=len(ids) + tokens)
    text = list(ids)
    logits = decoding.prefill(0, np.array(text))
    for _ in range(tokens):
        text.append(greedy(text, logits))
        logits = decoding.decode_step(np.array(text[-1:]))[0]
    return text[len(ids) :]


# Prompt lookup


def test_what_followed_before_is_guessed_again() -> None:
    lookup, ids = PromptLookup(), [5, 6, 7, 8, 9, 1, 5, 6]
    assert lookup.kind(ids) == MATCH_TOKENS.index(2)
    assert lookup.propose(ids, 3) == [7, 8, 9]


def test_a_text_that_goes_round_is_guessed_without_end() -> None:
    assert PromptLookup().propose([4, 1, 2, 3, 1, 2, 3], 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert PromptLookup().propose([9, 9], 5) == [9] * 5


def test_of_several_places_the_last_is_taken() -> None:
    assert PromptLookup().propose([1, 2, 30, 1, 2, 40, 1, 2], 1) == [40]


def test_more_agreement_counts_for_more_than_a_later_place() -> None:
    assert PromptLookup().propose([1, 2, 3, 4, 50, 0, 3, 4, 60, 1, 2, 3, 4], 1) == [50]


@pytest.mark.parametrize("ids", [[1], [1, 2, 3, 4], [1, 1, 2]])
def test_a_token_that_is_new_has_no_guess(ids: list[int]) -> None:
    assert PromptLookup().kind(ids) is None
    assert PromptLookup().propose(ids, 4) == []


def searched(ids: Sequence[int]) -> tuple[int, int] | None:
    """The kind and the place that lookup should find, by looking everywhere."""
    for kind, size in enumerate(MATCH_TOKENS):
        for place in range(len(ids) - 1, size - 1, -1):
            if list(ids[place - size : place]) == list(ids[len(ids) - size :]):
                return kind, place
    return None


@given(ids=st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_a_growing_text_is_looked_up_as_a_whole_one_is(ids: list[int]) -> None:
    lookup = PromptLookup()
    for length in range(1, len(ids) + 1):
        text = ids[:length]
        expected = searched(text)
        assert lookup.kind(text) == (None if expected is None else expected[0])
        if expected is not None:
            assert lookup.propose(text, 1) == [text[expected[1]]]


# A package that drafts


def test_a_package_guesses_what_it_would_write(fp32: Decoder) -> None:
    draft = DraftPackage(fp32).for_text(greedy)
    assert draft.propose(IDS, 6) == written(fp32, IDS, 6)


def test_guesses_do_not_depend_on_what_was_guessed_before(fp32: Decoder) -> None:
    """Accepted whole, in part, not at all, or not asked for a while: as a draft that begins there."""
    draft, text = DraftPackage(fp32).for_text(greedy, capacity=80), list(IDS)
    for accepted in (4, 2, 0, 4, 1, 0, 3):
        text += draft.propose(text, 4)[:accepted]
        text += IDS[: accepted % 3 + 1]  # the target's own, of which one is always there
        assert draft.propose(text, 4) == DraftPackage(fp32).for_text(greedy).propose(text, 4)


def test_asking_again_gives_the_same(fp32: Decoder) -> None:
    draft = DraftPackage(fp32).for_text(greedy)
    assert draft.propose(IDS, 5) == draft.propose(IDS, 5)


def test_the_choice_sees_the_text_with_its_guesses(fp32: Decoder) -> None:
    seen: list[list[int]] = []

    def choose(ids: Sequence[int], logits: NDArray[np.float32]) -> int:
        seen.append(list(ids))
        return len(ids)

    assert DraftPackage(fp32).for_text(choose).propose(IDS, 3) == [40, 41, 42]
    assert seen == [IDS, [*IDS, 40], [*IDS, 40, 41]]


def test_a_draft_stops_where_the_options_forbid_every_token(fp32: Decoder) -> None:
    def choose(ids: Sequence[int], logits: NDArray[np.float32]) -> int:
        if len(ids) == len(IDS) + 2:
            raise RequestError("the options forbid every token")
        return greedy(ids, logits)

    draft = DraftPackage(fp32).for_text(choose)
    assert draft.propose(IDS, 4) == written(fp32, IDS, 2)
    assert draft.propose([*IDS, 5, 6], 4) == []
    assert draft.propose([*IDS, 5, 6, 7], 4) == written(fp32, [*IDS, 5, 6, 7], 4)


def test_a_draft_stops_where_its_context_does(fp32: Decoder) -> None:
    ids = np.resize(IDS, fp32.config.n_ctx + 1).tolist()
    draft = DraftPackage(fp32).for_text(greedy)
    assert len(draft.propose(ids[:510], 8)) == 3
    assert len(draft.propose(ids[:512], 8)) == 1
    assert draft.kind(ids[:512]) == 0
    assert draft.kind(ids) is None


def test_what_guesses_take_is_known_beforehand(fp32: Decoder) -> None:
    """By a clock of which each look takes 1 s: each run takes 1 s, whatever it runs."""
    seconds = count()
    draft = DraftPackage(fp32, clock=lambda: next(seconds)).for_text(greedy)
    before = next(seconds)
    promised_ms = draft.catch_up_ms(IDS[:1]) + draft.expected_ms(5)
    draft.propose(IDS[:1], 5)
    assert promised_ms == pytest.approx(5000)
    assert next(seconds) - before == 2 * 5 + 1


def test_what_the_draft_has_missed_is_counted_in(fp32: Decoder) -> None:
    draft = DraftPackage(fp32).for_text(greedy)
    far_behind = draft.catch_up_ms(IDS)
    draft.propose(IDS[:-3], 2)
    assert 0 < draft.catch_up_ms(IDS) < far_behind
    assert draft.catch_up_ms(IDS[:-2]) == 0


# Whom it drafts for


def test_packages_of_one_tokenizer_draft_for_each_other(demo_int4: Path, demo_int8: Path) -> None:
    check_same_tokenizer(open_package(demo_int4), open_package(demo_int8))


def test_a_package_of_another_vocabulary_is_refused(tiny_fp32: Path, demo_int8: Path) -> None:
    with pytest.raises(RequestError) as raised:
        check_same_tokenizer(open_package(tiny_fp32), open_package(demo_int8))
    assert str(raised.value) == (
        f"{tiny_fp32} cannot draft for {demo_int8}: its tokenizer is another one (257 tokens against 8192); draft with "
        "a package of the same vocabulary"
    )


def retokenized(package: Path, change: Callable[[dict[str, int]], None]) -> Package:
    """The package after a change of its vocabulary, which its manifest agrees with."""
    path = package / TOKENIZER
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    change(tokenizer["model"]["vocab"])
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return Package(package, replace(read_manifest(package), files={TOKENIZER: file_entry(path)}))


def test_a_token_that_stands_for_other_text_is_refused(copied: Callable[[Path], Path], tiny_fp32: Path) -> None:
    other = retokenized(copied(tiny_fp32), lambda vocabulary: vocabulary.update(A=66, B=65))
    with pytest.raises(RequestError, match=r"\(token 65 is b'B' against b'A'\)"):
        check_same_tokenizer(other, open_package(tiny_fp32))


def test_the_same_vocabulary_in_another_file_is_accepted(copied: Callable[[Path], Path], tiny_fp32: Path) -> None:
    other, target = retokenized(copied(tiny_fp32), lambda vocabulary: None), open_package(tiny_fp32)
    assert other.manifest.files[TOKENIZER] != target.manifest.files[TOKENIZER]
    check_same_tokenizer(other, target)
