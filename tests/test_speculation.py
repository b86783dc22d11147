"""Speculation: the seed's text, whatever was guessed, and never far behind plain steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.decoder import Decoder, Decoding
from runtime.draft_pace import HEAD_START, RUN_TOKENS, TOLERANCE, Pace
from runtime.drafts import Draft, DraftPackage, PromptLookup
from runtime.errors import RequestError
from runtime.package import open_package
from runtime.sampling import SamplingOptions, choose_token, random_uniform
from runtime.speculation import Speculation, SpeculationStats, speculative_tokens
from runtime.text_generator import open_decoder

Choose = Callable[[Sequence[int], NDArray[np.float32]], int]

DRAFTED_TEXTS = int(os.environ.get("SPECULATION_TEXTS", "10"))
"""Texts that the int4 package drafts for the int8 one; benchmarks/speculation.py does it with 100."""

PROMPT = np.random.default_rng(11).integers(0, 8191, 24).tolist()
GREEDY = SamplingOptions.greedy()
SAMPLED = SamplingOptions(seed=5, top_k=40)

PREDICTION = 0.15
"""Tokens a millisecond, as predicted before each run against what came. Measured on a clock without noise: 0.02."""

RUN_MS = {1: 40.0, 2: 45.0, 4: 52.0, 6: 53.0, 8: 63.0, 12: 73.0, 16: 84.0, 24: 106.0, 32: 129.0}
"""774M int8 on two cores."""
STEEP_RUN_MS = {size: 40.0 * size for size in (1, *RUN_TOKENS)}
"""A machine on which no token comes for less than a run of its own."""


@pytest.fixture(scope="module")
def fp32(demo_fp32: Path) -> Decoder:
    return open_decoder(open_package(demo_fp32))


@pytest.fixture(scope="module")
def int8(demo_int8: Path) -> Decoder:
    return open_decoder(open_package(demo_int8))


@pytest.fixture(scope="module")
def int4(demo_int4: Path) -> Decoder:
    return open_decoder(open_package(demo_int4))


@pytest.fixture(params=["fp32", "int8", "int4"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    chosen: Decoder = request.getfixturevalue(request.param)
    return chosen


@dataclass
class Foreteller:
    """Knows the text, and tells the next tokens of it: right with some chance, wrong from `honest_until` on."""

    text: Sequence[int]
    chance: float = 1.0
    honest_until: int = 10**9
    honest_from: int = 0
    seed: int = 0
    asked: list[int] = field(default_factory=list)

    def kind(self, ids: Sequence[int]) -> int | None:
        return 0

    def expected_ms(self, count: int) -> float:
        return 0.0

    def catch_up_ms(self, ids: Sequence[int]) -> float:
        return 0.0

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        self.asked.append(count)
        places = range(len(ids), len(ids) + count)
        return [self.text[place] if self.is_right(place) else self.wrong(place) for place in places]

    def is_right(self, place: int) -> bool:
        if not self.honest_from <= place < min(self.honest_until, len(self.text)):
            return False
        return random_uniform(self.seed, 1, place) < self.chance

    def wrong(self, place: int) -> int:
        return (self.text[place] + 1) % 8191 if place < len(self.text) else 17


def chooser(options: SamplingOptions) -> Choose:
    return lambda ids, logits: choose_token(logits, options, random_uniform(options.seed or 0, 0, len(ids)))


def plain(decoder: Decoder, options: SamplingOptions, tokens: int, prompt: Sequence[int] = PROMPT) -> list[int]:
    """Prompt and text by single steps."""
    choose, ids = chooser(options), list(prompt)
    decoding = decoder.start(batch=1, capacity=len(prompt) + tokens)
    logits = decoding.prefill(0, np.array(prompt))
    for _ in range(tokens):
        ids.append(choose(ids, logits))
        logits = decoding.decode_step(np.array(ids[-1:]))[0]
    return ids


@dataclass
class Written:
    """Prompt and text, and what is left behind."""

    ids: list[int]
    stats: SpeculationStats
    decoding: Decoding


def speculate(
    decoder: Decoder,
    options: SamplingOptions,
    tokens: int,
    *,
    draft: Draft | None,
    pace: Pace,
    prompt: Sequence[int] = PROMPT,
    end: int | None = None,
) -> Written:
    decoding = decoder.start(batch=1, capacity=len(prompt))
    logits = decoding.prefill(0, np.array(prompt))
    speculation = Speculation(decoding, 0, n_ctx=decoder.config.n_ctx, pace=pace, draft=draft)
    new = speculative_tokens(speculation, prompt, logits, chooser(options), max_new_tokens=tokens, end=end)
    return Written([*prompt, *new], speculation.stats, decoding)


def cached(decoding: Decoding) -> list[NDArray[np.float32]]:
    length = decoding.cache.lengths[0]
    return [buffer[0, :, :length] for _, _, buffer in decoding.cache.bindings(slice(0, 1))]


# The text is the seed's


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft_tokens", [None, 1, 4, 31])
def test_exact_texts_are_the_same_whatever_was_guessed(
    decoder: Decoder, options: SamplingOptions, draft_tokens: int | None
) -> None:
    without = speculate(decoder, options, 60, draft=None, pace=Pace(exact=True))
    for chance in (0.0, 0.8, 1.0):
        foreteller = Foreteller(without.ids, chance)
        written = speculate(decoder, options, 60, draft=foreteller, pace=Pace(exact=True, draft_tokens=draft_tokens))
        assert written.ids == without.ids
        assert (written.stats.accepted > 0) == (chance > 0)
    looked_up = speculate(decoder, options, 60, draft=PromptLookup(), pace=Pace(exact=True, draft_tokens=draft_tokens))
    assert looked_up.ids == without.ids


@pytest.mark.parametrize("text", range(DRAFTED_TEXTS))
def test_exact_text_with_an_int4_draft_is_the_int8_text(int8: Decoder, int4: Decoder, text: int) -> None:
    """Long enough that the draft is wrong somewhere: in 48 tokens one of ten texts had no guess refused."""
    prompt = np.random.default_rng(text).integers(0, 8191, 3 + text).tolist()
    options = SamplingOptions(seed=text) if text % 2 else GREEDY
    without = speculate(int8, options, 144, draft=None, pace=Pace(exact=True), prompt=prompt)
    draft = DraftPackage(int4).for_text(chooser(options))
    written = speculate(int8, options, 144, draft=draft, pace=Pace(exact=True, draft_tokens=4), prompt=prompt)
    assert written.ids == without.ids
    assert 0 < written.stats.accepted < written.stats.drafted


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_fp32_text_is_the_plain_text_without_exact_mode(fp32: Decoder, int4: Decoder, options: SamplingOptions) -> None:
    """Single steps are a rounding off pieces there, which no choice in these texts hangs on."""
    expected = plain(fp32, options, 120)
    package = DraftPackage(int4)
    for draft_tokens in (None, 4):
        drafts: list[Draft | None] = [
            None,
            PromptLookup(),
            Foreteller(expected, chance=0.0),
            Foreteller(expected, chance=0.7),
            package.for_text(chooser(options)),
        ]
        for draft in drafts:
            written = speculate(fp32, options, 120, draft=draft, pace=Pace(draft_tokens=draft_tokens))
            assert written.ids == expected


def test_without_a_draft_default_runs_are_plain_steps(int8: Decoder) -> None:
    written = speculate(int8, SAMPLED, 60, draft=None, pace=Pace())
    assert written.ids == plain(int8, SAMPLED, 60)
    assert written.stats.tokens_per_run == 1


@pytest.mark.parametrize("past", [1, 2, 63, 64, 127, 128, 129, 255, 256, 257, 460])
def test_even_pieces_give_the_same_bits_at_any_place(decoder: Decoder, past: int) -> None:
    """What exact mode stands on. At 4 bits, pieces of an odd number do not."""
    ids = np.resize(PROMPT, past + RUN_TOKENS[-1])

    def run(size: int) -> NDArray[np.float32]:
        decoding = decoder.start(batch=1, capacity=len(ids))
        decoding.prefill(0, ids[:past])
        (logits,) = decoding.append(0, ids[past : past + size])
        return logits.copy()

    largest = run(RUN_TOKENS[-1])
    for size in RUN_TOKENS[:-1]:
        assert np.array_equal(run(size), largest[:size])


# Rewinding, and where texts end


def test_the_cache_is_left_as_if_nothing_had_been_guessed(decoder: Decoder) -> None:
    without = speculate(decoder, SAMPLED, 60, draft=None, pace=Pace(exact=True))
    draft = Foreteller(without.ids, chance=0.6)
    written = speculate(decoder, SAMPLED, 60, draft=draft, pace=Pace(exact=True, draft_tokens=6))
    assert 0 < written.stats.accepted < written.stats.drafted
    assert written.decoding.cache.lengths.tolist() == [len(written.ids) - 1]
    for ours, theirs in zip(cached(written.decoding), cached(without.decoding), strict=True):
        assert np.array_equal(ours, theirs)


def test_other_rows_are_left_alone(fp32: Decoder) -> None:
    decoding = fp32.start(batch=3, capacity=60)
    for row in (0, 2):
        decoding.prefill(row, np.array(PROMPT[: 5 + row]))
    before = [buffer[[0, 2]].copy() for _, _, buffer in decoding.cache.bindings(slice(0, 3))]
    expected = plain(fp32, GREEDY, 20)
    logits = decoding.prefill(1, np.array(PROMPT))
    draft = Foreteller(expected, chance=0.5)
    speculation = Speculation(decoding, 1, n_ctx=512, pace=Pace(draft_tokens=3), draft=draft)
    new = speculative_tokens(speculation, PROMPT, logits, chooser(GREEDY), max_new_tokens=20)
    assert [*PROMPT, *new] == expected
    assert decoding.cache.lengths.tolist() == [5, len(PROMPT) + 19, 7]
    for old, (_, _, buffer) in zip(before, decoding.cache.bindings(slice(0, 3)), strict=True):
        assert np.array_equal(old, buffer[[0, 2]])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 20])
def test_a_text_that_fills_the_context_is_written_to_its_end(fp32: Decoder, exact: bool, tokens: int) -> None:
    prompt = np.resize(PROMPT, fp32.config.n_ctx - tokens).tolist()
    expected = plain(fp32, GREEDY, tokens, prompt)
    draft = Foreteller([*expected, *PROMPT, *PROMPT])
    pace = Pace(exact=exact, draft_tokens=31)
    written = speculate(fp32, GREEDY, tokens, draft=draft, pace=pace, prompt=prompt)
    assert written.ids == expected
    assert all(count < tokens for count in draft.asked)


@pytest.mark.parametrize("exact", [False, True])
def test_the_last_place_of_the_context_can_be_run(int8: Decoder, exact: bool) -> None:
    """As a window that moves on needs it; in exact mode no guess may stand there, whatever the draft."""
    n_ctx = int8.config.n_ctx
    window = np.resize(PROMPT, n_ctx - 6).tolist()
    texts = []
    for draft in (None, Foreteller([*window, *PROMPT], chance=0.0), Foreteller([*window, *PROMPT])):
        decoding = int8.start(batch=1, capacity=n_ctx)
        decoding.prefill(0, np.array(window[:-1]))
        pace = Pace(exact=exact, draft_tokens=4)
        speculation, ids = Speculation(decoding, 0, n_ctx=n_ctx, pace=pace, draft=draft), list(window)
        while len(ids) <= n_ctx:
            speculation.step(ids, lambda logits, ids=ids: ids.append(int(logits.argmax())) or ids[-1], most=100)
        assert decoding.cache.lengths.tolist() == [len(ids) - 1] == [n_ctx]
        texts.append(ids)
        with pytest.raises(RequestError, match=f"{n_ctx + 1} tokens do not fit"):
            speculation.step(ids, lambda logits: 0, most=1)
    assert texts[0] == texts[1] == texts[2] or not exact


def test_an_end_among_accepted_guesses_ends_the_text(fp32: Decoder) -> None:
    whole = plain(fp32, SAMPLED, 40)
    place = next(p for p in range(len(PROMPT) + 9, len(whole)) if whole[p] not in whole[len(PROMPT) : p])
    draft = Foreteller(whole)
    written = speculate(fp32, SAMPLED, 40, draft=draft, pace=Pace(draft_tokens=31), end=whole[place])
    assert written.ids == whole[: place + 1]
    assert written.stats.runs == 1
    assert written.decoding.cache.lengths.tolist() == [place]


def test_a_guess_that_was_the_end_is_not_taken_for_wrong(fp32: Decoder) -> None:
    whole, pace = plain(fp32, SAMPLED, 3), Pace(draft_tokens=1)
    expected = pace.plan(0, 1, lambda _: 0.0).tokens
    written = speculate(fp32, SAMPLED, 3, draft=Foreteller(whole), pace=pace, end=whole[len(PROMPT) + 1])
    assert written.ids == whole[: len(PROMPT) + 2]
    assert pace.plan(0, 1, lambda _: 0.0).tokens == expected


def test_an_error_in_a_choice_leaves_what_was_taken(fp32: Decoder) -> None:
    expected = plain(fp32, GREEDY, 20)
    decoding = fp32.start(batch=1, capacity=60)
    decoding.prefill(0, np.array(PROMPT))
    ids = expected[: len(PROMPT) + 1]
    pace = Pace(draft_tokens=8)
    speculation = Speculation(decoding, 0, n_ctx=512, pace=pace, draft=Foreteller(expected))

    def take(logits: NDArray[np.float32]) -> int:
        if len(ids) == len(PROMPT) + 4:
            raise ValueError("enough")
        ids.append(int(logits.argmax()))
        return ids[-1]

    with pytest.raises(ValueError, match="enough"):
        speculation.step(ids, take, most=20)
    assert ids == expected[: len(PROMPT) + 4]
    assert decoding.cache.lengths.tolist() == [len(ids) - 1]


def test_each_token_is_chosen_once_and_in_order(fp32: Decoder) -> None:
    """Whoever takes part in the choice sees what plain steps would show: a grammar, say, that goes along."""
    expected, seen = plain(fp32, GREEDY, 30), []

    def choose(ids: Sequence[int], logits: NDArray[np.float32]) -> int:
        seen.append(list(ids))
        return int(logits.argmax())

    decoding = fp32.start(batch=1, capacity=60)
    logits = decoding.prefill(0, np.array(PROMPT))
    draft = Foreteller(expected, chance=0.6)
    speculation = Speculation(decoding, 0, n_ctx=512, pace=Pace(draft_tokens=5), draft=draft)
    list(speculative_tokens(speculation, PROMPT, logits, choose, max_new_tokens=30))
    assert seen == [expected[:length] for length in range(len(PROMPT), len(expected))]


# How much is guessed: on a clock that goes by the run's size


class ClockedDecoding:
    """A decoding whose runs take what a table says."""

    def __init__(self, decoding: Decoding, run_ms: dict[int, float]) -> None:
        self._decoding = decoding
        self._run_ms = run_ms
        self.cache = decoding.cache
        self.ms = 0.0

    def append(self, row: int, ids: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        self.ms += float(np.interp(len(ids), list(self._run_ms), list(self._run_ms.values())))
        return self._decoding.append(row, ids)

    def seconds(self) -> float:
        return self.ms / 1e3


def clocked(
    decoder: Decoder,
    text: Sequence[int],
    draft: Draft,
    *,
    run_ms: dict[int, float] = RUN_MS,
    pace: Pace | None = None,
) -> Iterator[tuple[int, float, SpeculationStats]]:
    """After each run: tokens so far, ms so far, and what came of it."""
    decoding = ClockedDecoding(decoder.start(batch=1, capacity=len(text)), run_ms)
    list(decoding._decoding.append(0, np.array(PROMPT)))
    ids = list(text[: len(PROMPT) + 1])
    speculation = Speculation(
        decoding,  # type: ignore[arg-type]
        0,
        n_ctx=decoder.config.n_ctx,
        pace=pace or Pace(),
        draft=draft,
        clock=decoding.seconds,
    )

    def take(logits: NDArray[np.float32]) -> int:
        ids.append(text[len(ids)])  # whatever the model would say: the clock is what matters here
        return ids[-1]

    while len(ids) < len(text):
        speculation.step(ids, take, most=len(text) - len(ids))
        yield len(ids) - len(PROMPT) - 1, decoding.ms, speculation.stats


TEXT = [*PROMPT, *np.random.default_rng(2).integers(0, 8191, 440).tolist()]


@pytest.mark.parametrize("run_ms", [RUN_MS, STEEP_RUN_MS], ids=["774M", "steep"])
@pytest.mark.parametrize(
    "draft",
    [
        Foreteller(TEXT, chance=0.0),
        Foreteller(TEXT, chance=0.1),
        Foreteller(TEXT, chance=0.5),
        Foreteller(TEXT, chance=0.9),
        Foreteller(TEXT, honest_until=100),
        Foreteller(TEXT, honest_from=200),
    ],
    ids=["hostile", "poor", "even", "good", "turns-bad", "turns-good"],
)
def test_no_draft_makes_a_text_slower_than_it_is_allowed_to(
    fp32: Decoder, run_ms: dict[int, float], draft: Draft
) -> None:
    for tokens, ms, _ in clocked(fp32, TEXT, draft, run_ms=run_ms):
        assert ms <= run_ms[1] * (tokens * (1 + TOLERANCE) + HEAD_START)


def test_a_hostile_draft_costs_less_than_a_twentieth(fp32: Decoder) -> None:
    *_, (tokens, ms, _) = clocked(fp32, TEXT[:150], Foreteller(TEXT, chance=0.0))
    assert ms <= 1.05 * RUN_MS[1] * tokens


def test_a_good_draft_makes_a_text_several_times_as_fast(fp32: Decoder) -> None:
    *_, (tokens, ms, stats) = clocked(fp32, TEXT, Foreteller(TEXT))
    assert RUN_MS[1] * tokens / ms > 5
    assert stats.acceptance == 1


def test_a_draft_that_was_wrong_for_long_is_found_to_be_right_again(fp32: Decoder) -> None:
    progress = list(clocked(fp32, TEXT, Foreteller(TEXT, honest_from=200)))
    assert sum(tokens > 250 for tokens, _, _ in progress) < 60  # of 190 tokens


def test_what_one_text_has_taught_serves_the_next(fp32: Decoder) -> None:
    pace = Pace()
    runs = [len(list(clocked(fp32, TEXT[:120], Foreteller(TEXT), pace=pace))) for _ in range(2)]
    assert runs[1] < runs[0]


@pytest.mark.parametrize("chance", [0.6, 0.8])
@pytest.mark.parametrize("draft_tokens", [None, 5])
def test_what_is_predicted_comes(fp32: Decoder, chance: float, draft_tokens: int | None) -> None:
    pace, total = Pace(draft_tokens=draft_tokens), SpeculationStats()
    for seed in range(2):
        *_, (_, _, stats) = clocked(fp32, TEXT[:300], Foreteller(TEXT, chance, seed=seed), pace=pace)
        total += stats
    assert total.predicted_tokens_per_ms == pytest.approx(total.measured_tokens_per_ms, rel=PREDICTION)


def test_statistics_add_up(fp32: Decoder) -> None:
    *_, (tokens, _, stats) = clocked(fp32, TEXT, Foreteller(TEXT, chance=0.7))
    assert stats.tokens == tokens == stats.runs + stats.accepted
    assert stats.tokens_per_run == tokens / stats.runs
    assert stats.acceptance == stats.accepted / stats.drafted
    assert (stats + stats).drafted == 2 * stats.drafted
    assert SpeculationStats().acceptance == SpeculationStats().tokens_per_run == 0
