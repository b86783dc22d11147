"""How many tokens to guess ahead: from what was accepted so far, and from what runs take on this machine.

A run of S tokens gives 1 to S of the text, and takes longer than a run of one. So the length to guess is the one with
the most tokens a millisecond to expect, and none where guessing does not pay. All is learned from the runs themselves,
none are made to measure.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from .errors import RequestError

RUN_TOKENS = (2, 4, 6, 8, 12, 16, 24, 32)
"""Sizes of a run with guesses: few, so that each is soon measured. All even: onnxruntime's product with 4-bit blocks
takes rows two by two, and rounds the last of an odd number differently (1.32.0, AVX-512)."""

MAX_DRAFT_TOKENS = RUN_TOKENS[-1] - 1

COST_SLOPE = 0.1
"""What a token more is taken to add to a run, in runs of one token, until it is known. 774M: int8 0.08, 4 bit 0.17."""

RECENT = 0.2
"""Weight of the newest of several times: keys and values grow, processors get warm. A size that was not run for some
runs is forgotten as fast, but for `MOST_RECENT` of it at once."""

MOST_RECENT = 0.5

FIRST_RUNS = 4
"""Of the first runs of a size the fastest counts: onnxruntime plans its memory in the first, caches are cold."""

OUTLIER = 2.0
"""A time counts as at most this many times what was expected: somebody else had the processor."""

MEMORY = 0.9
"""Weight of what was accepted before against the newest: the last 10 tries decide."""

FIRST_CHANCE = 0.5
"""Chance of a guess of which nothing is known; it weighs as much as one try."""

TOLERANCE = 0.03
"""How far guessing may fall behind plain steps, as a share of them: 5% are promised, the rest is for what guessing and
choosing a length take themselves."""

PLAIN = 1
"""What a run without guesses counts as, in exact mode too, where it is as large as one with one guess: behind a draft's
run the same piece takes longer, the demo model's 0.37 ms instead of 0.30, with its weights no longer in the cache."""

REFRESH_RUNS = 50
"""At least every so many runs is made without a guess: what guessing wins is measured by it."""

HEAD_START = 1.0
"""Plain steps by which guessing may fall behind at once, or it could never begin."""

PAUSE_RUNS = 8
"""So many runs pass before a kind of guess that does not pay is weighed again, unless something is learned of it: where
a run takes 0.4 ms, as the demo model's, weighing it each time would be 3% of it."""

WATCH_SHARE = 0.01
"""Share of the time that goes into guesses which are only compared, not run: they tell when guessing pays again."""


class RunCosts:
    """Milliseconds of a run by its number of new tokens, learned from runs. Threads may share it."""

    def __init__(self) -> None:
        self._ms: dict[int, float] = {}
        self._runs: defaultdict[int, int] = defaultdict(int)
        self._all_runs = 0
        self._last_run: dict[int, int] = {}  # of all runs, by size
        self._sizes: list[int] = []  # the keys of _ms in order
        self._lock = Lock()

    def settled(self, tokens: int) -> bool:
        """Whether runs of this size were seen often enough to build on: the first of a size is slower than others."""
        return self._runs[_size(tokens)] > 1

    def observe(self, tokens: int, ms: float) -> None:
        """Learn from a run of `tokens` new tokens."""
        with self._lock:
            self._observe(tokens, ms)

    def _observe(self, tokens: int, ms: float) -> None:
        size = _size(tokens)
        ms *= size / tokens
        if not self._runs[size]:
            self._ms[size] = ms
            insort(self._sizes, size)
        elif self._runs[size] < FIRST_RUNS:
            self._ms[size] = min(ms, self._ms[size])
        else:
            weight = min(MOST_RECENT, RECENT * (self._all_runs - self._last_run[size]))
            self._ms[size] += weight * (min(ms, OUTLIER * self._ms[size]) - self._ms[size])
        self._runs[size] += 1
        self._last_run[size] = self._all_runs
        self._all_runs += 1

    def ms(self, tokens: int) -> float:
        """What a run of `tokens` new tokens takes; between measured sizes on a line, beyond them on from the last two.

        Of a size that was measured, at most what a larger one takes: it may have been measured on a busier machine.
        """
        with self._lock:
            return self._expected(tokens)

    def _expected(self, tokens: int) -> float:
        sizes = self._sizes
        place = bisect_left(sizes, tokens)
        if tokens in self._ms:
            return min(self._ms[size] for size in sizes[place:])
        if place == 0:
            return self._ms[sizes[0]] * (1 + COST_SLOPE * (tokens - 1)) / (1 + COST_SLOPE * (sizes[0] - 1))
        below = sizes[place - 1]
        if place < len(sizes):
            slope = (self._ms[sizes[place]] - self._ms[below]) / (sizes[place] - below)
        else:
            slope = COST_SLOPE * self._ms[sizes[0]] / (1 + COST_SLOPE * (sizes[0] - 1))
            if place > 1:
                before = sizes[place - 2]
                slope = max(slope, (self._ms[below] - self._ms[before]) / (below - before))
        return self._ms[below] + slope * (tokens - below)

    @property
    def largest(self) -> int:
        """The largest size that was measured."""
        return self._sizes[-1]


class Acceptance:
    """How often the 1st, 2nd ... guess of a draft was right where all before it were.

    `pause` counts the runs for which they are not weighed again; it ends when something is learned.
    """

    def __init__(self) -> None:
        self.pause = 0
        self._tries = [0.0] * MAX_DRAFT_TOKENS
        self._hits = [0.0] * MAX_DRAFT_TOKENS
        self._expected: list[float] = []

    def observe(self, accepted: int, *, tried: int) -> None:
        """Learn from `tried` guesses, of which the first `accepted` were right, and the next wrong if there is one."""
        for place in range(min(accepted + 1, tried)):
            self._tries[place] = MEMORY * self._tries[place] + 1
            self._hits[place] = MEMORY * self._hits[place] + (place < accepted)
        self._expected = []
        self.pause = 0

    def expected_tokens(self, guesses: int) -> float:
        """Tokens that a run with so many guesses gives: 1 + p1 + p1 p2 + ...

        Of a place that was seldom tried, the chance is mostly that of the place before it.
        """
        if not self._expected:
            chance, reached, total = FIRST_CHANCE, 1.0, 1.0
            self._expected = [total]
            for tries, hits in zip(self._tries, self._hits, strict=True):
                chance = (hits + chance) / (tries + 1)
                reached *= chance
                total += reached
                self._expected.append(total)
        return self._expected[guesses]


@dataclass(frozen=True, slots=True)
class Plan:
    """A run to make: how many tokens to guess, and what is expected of it; ms is None before any run was timed."""

    guesses: int
    tokens: float
    ms: float | None


class Pace:
    """What is learned about one target and its draft; texts, and threads, share it."""

    def __init__(self, *, exact: bool = False, draft_tokens: int | None = None) -> None:
        """Begin without any knowledge.

        Args:
            exact: a single token is run as a piece of two, so that all runs give the same bits.
            draft_tokens: guess always so many; None finds the number that pays, and keeps within `TOLERANCE`.
        Raises:
            RequestError: draft_tokens is out of range.
        """
        if draft_tokens is not None and not (type(draft_tokens) is int and 1 <= draft_tokens <= MAX_DRAFT_TOKENS):
            raise RequestError(f"draft_tokens is {draft_tokens!r}, expected 1 to {MAX_DRAFT_TOKENS}, or none to adapt")
        self.exact = exact
        self._draft_tokens = draft_tokens
        self._costs = RunCosts()
        self._acceptance: defaultdict[int, Acceptance] = defaultdict(Acceptance)  # by the draft's kind
        self._token_ms = 0.0  # choosing a token, and what else a step does beside its run
        self._steps = 0.0  # tokens so far: as many plain steps
        self._ahead = 0.0  # plain steps won by guessing; lost, where negative
        self._unwatched = 0  # runs since guesses were last compared
        self._unrefreshed = 0  # runs with guesses since the last without
        self._lock = Lock()

    def run_size(self, guesses: int) -> int:
        """Tokens of the run: the last one and the guesses, in exact mode filled up to an even number."""
        size = 1 + guesses
        return size + size % 2 if self.exact else size

    def _counts_as(self, guesses: int) -> int:
        return self.run_size(guesses) if guesses else PLAIN

    def plan(
        self,
        kind: int | None,
        most: int,
        draft_ms: Callable[[int], float],
        *,
        catch_up_ms: Callable[[], float] = lambda: 0.0,
    ) -> Plan:
        """Settle how many tokens to guess.

        Args:
            kind: of the draft's guess, which tells one chance from another; None where it has none.
            most: guesses that have room.
            draft_ms: what so many guesses take the draft.
            catch_up_ms: what it takes before them, once, to read what it has missed; asked for only where it matters.
        """
        with self._lock:
            guesses = 0
            if kind is not None and most > 0:
                guesses = min(
                    most, self._draft_tokens or self._best(self._acceptance[kind], most, draft_ms, catch_up_ms)
                )
            tokens = self._acceptance[kind].expected_tokens(guesses) if kind is not None else 1.0
            if not self._costs.settled(PLAIN):
                return Plan(guesses, tokens, None)
            ms = self._costs.ms(self._counts_as(guesses)) + tokens * self._token_ms
            return Plan(guesses, tokens, ms + draft_ms(guesses) + catch_up_ms() if guesses else ms)

    def _best(
        self, acceptance: Acceptance, most: int, draft_ms: Callable[[int], float], catch_up_ms: Callable[[], float]
    ) -> int:
        """The number of guesses with the most tokens a millisecond; none where catching up is never made good."""
        if not self._costs.settled(PLAIN) or self._unrefreshed >= REFRESH_RUNS:
            return 0
        if acceptance.pause:
            acceptance.pause -= 1
            return 0
        plain_ms = self._costs.ms(PLAIN)
        most_ms = plain_ms * (1 + HEAD_START + TOLERANCE * self._steps + self._ahead)
        best, best_rate, outlay_ms = 0, 1 / plain_ms, None
        for size in RUN_TOKENS:
            if size > most + 1 or size > 2 * self._costs.largest:  # no room, or its time is hardly known
                break
            ms = self._costs.ms(size) + draft_ms(size - 1)
            rate = acceptance.expected_tokens(size - 1) / ms
            if rate <= best_rate:
                continue
            if outlay_ms is None:
                outlay_ms = catch_up_ms()
            if ms + outlay_ms > most_ms:  # all guesses may be wrong
                break
            if (plain_ms - 1 / rate) * most >= outlay_ms:
                best, best_rate = size - 1, rate
        if outlay_ms is None:
            acceptance.pause = PAUSE_RUNS
        return best

    def ran(self, kind: int | None, outcome: Outcome) -> None:
        """Learn from a run."""
        with self._lock:
            self._costs.observe(self._counts_as(outcome.guesses), outcome.run_ms)
            if outcome.guesses and kind is not None:
                self._acceptance[kind].observe(outcome.accepted, tried=outcome.tried)
            token_ms = outcome.other_ms / outcome.tokens
            self._token_ms += (RECENT if self._steps else 1.0) * (token_ms - self._token_ms)
            self._unwatched += 1
            self._steps += outcome.tokens
            self._unrefreshed = self._unrefreshed + 1 if outcome.guesses else 0
            plain_ms = self._costs.ms(PLAIN)
            self._ahead -= outcome.draft_ms / plain_ms
            if outcome.guesses:
                self._ahead += outcome.tokens - outcome.run_ms / plain_ms

    def may_watch(self, draft_ms: float, *, catch_up_ms: Callable[[], float] = lambda: 0.0) -> bool:
        """Whether guesses that are only compared may be made now; if so, they are taken to be made."""
        with self._lock:
            if not self._costs.settled(PLAIN):
                return False
            share_ms = WATCH_SHARE * self._unwatched * self._costs.ms(PLAIN)
            if draft_ms > share_ms or draft_ms + catch_up_ms() > share_ms:
                return False
            self._unwatched = 0
            return True

    def watched(self, kind: int, accepted: int, *, tried: int) -> None:
        """Learn from guesses that were only compared with what plain steps gave."""
        with self._lock:
            self._acceptance[kind].observe(accepted, tried=tried)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to. `tried` are the guesses that were compared, all but where the text ended among them."""

    guesses: int
    tried: int
    accepted: int
    tokens: int  # of the text
    draft_ms: float
    run_ms: float
    other_ms: float


def _size(tokens: int) -> int:
    """The size that a run counts as: its own, or beyond a draft's the power of two above it."""
    return tokens if tokens <= RUN_TOKENS[-1] else 1 << (tokens - 1).bit_length()
