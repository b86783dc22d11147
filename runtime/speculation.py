"""Speculation: one run of the model checks several guessed tokens, and the text stays the text of its seed.

The model's last token and the guesses behind it are run in one piece. At each place the token is chosen from the
model's own logits, as ever; a guess that equals it is accepted, and with it the logits behind it, which are the text's.
The first guess that differs ends the run, and the cache forgets it and all after it. Nothing is accepted by odds:
guesses decide how many tokens a run gives, never which.

What may differ by default: a token that is run alone is rounded a little differently from one that is run in a piece,
and where guesses were made some tokens are run in pieces that plain steps run alone. Over 2,005 sampled tokens of the
demo model that is KL 2e-12 nats a token at fp32, 1.5e-4 at int8 and 2.6e-4 at int4 (a hundredth of what int4 itself
costs), and another most probable token at 0, 21 and 27 places: the same distribution, but not always the seed's text.
`benchmarks/speculation.py rounding` measures it.

In exact mode, all runs are pieces of an even number of tokens, filled up with one that is thrown away, and the text is
the same to the last bit at every precision, whatever the guesses were, none among them. A run without a guess takes
longer there by what a second token costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .decoder import Decoding
from .draft_pace import Outcome, Pace, Plan
from .drafts import Choose, Draft

Take: TypeAlias = "Callable[[NDArray[np.float32]], int | None]"
"""Takes the text's next token from the logits [V], which it may change; returns its id, None if the text has ended."""

WATCHED_TOKENS = 4
"""Guesses that are only compared, at a time."""


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """What guessing came to; those of several texts add up.

    The last four count runs with guesses alone, and of them those that were predicted, which the very first are not.
    """

    runs: int = 0
    tokens: int = 0  # that they gave
    drafted: int = 0  # guesses that were run
    accepted: int = 0
    drafting_tokens: int = 0
    drafting_ms: float = 0.0
    predicted_tokens: float = 0.0
    predicted_ms: float = 0.0

    @property
    def acceptance(self) -> float:
        """Share of the guesses that were right and stood behind right ones; 0 where there were none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_run(self) -> float:
        return self.tokens / self.runs if self.runs else 0.0

    @property
    def measured_tokens_per_ms(self) -> float:
        return self.drafting_tokens / self.drafting_ms if self.drafting_ms else 0.0

    @property
    def predicted_tokens_per_ms(self) -> float:
        return self.predicted_tokens / self.predicted_ms if self.predicted_ms else 0.0

    def __add__(self, other: SpeculationStats) -> SpeculationStats:
        return SpeculationStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(slots=True)
class _Watch:
    """Guesses that are compared with what plain steps give."""

    kind: int
    guesses: list[int]
    accepted: int = 0


class Speculation:
    """One row of a decoding, which takes as many tokens from a run as were guessed right, and one more."""

    def __init__(
        self,
        decoding: Decoding,
        row: int,
        *,
        n_ctx: int,
        pace: Pace,
        draft: Draft | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Go on with a row that holds a text but for its last token.

        Args:
            decoding: has run the text.
            row: which of its rows.
            n_ctx: the model's context.
            pace: how many tokens to guess, learned from all texts that share it; it knows whether runs are exact.
            draft: guesses this text; None runs plain steps, or exact ones.
            clock: seconds from any beginning.
        """
        self._decoding = decoding
        self._row = row
        self._n_ctx = n_ctx
        self._pace = pace
        self._draft = draft
        self._clock = clock
        self._watch: _Watch | None = None
        self._runs = self._tokens = self._drafted = self._accepted = self._drafting_tokens = 0
        self._drafting_ms = self._predicted_tokens = self._predicted_ms = 0.0

    @property
    def stats(self) -> SpeculationStats:
        """What came of it so far."""
        return SpeculationStats(
            runs=self._runs,
            tokens=self._tokens,
            drafted=self._drafted,
            accepted=self._accepted,
            drafting_tokens=self._drafting_tokens,
            drafting_ms=self._drafting_ms,
            predicted_tokens=self._predicted_tokens,
            predicted_ms=self._predicted_ms,
        )

    def step(self, ids: Sequence[int], take: Take, *, most: int) -> int:
        """Run the model once.

        Args:
            ids: the text so far, prompt included; the row holds all but the last.
            take: takes tokens, one call for each; whatever it does with `ids` is its own affair.
            most: tokens that the text has still room for, at least 1.
        Returns:
            How many tokens were taken, 1 to `most`. The row holds all but the last of them.
        Raises:
            RequestError: the context is full, or a guess is no id of the model.
            MachineError: memory ran out.
        """
        started = self._clock()
        kind, plan = self._plan(ids, most)
        planned = self._clock()
        guesses = self._guess(ids, kind, plan)
        guessed = self._clock()
        past = int(self._decoding.cache.lengths[self._row])
        logits = self._run(ids[-1], guesses)  # [S, V]
        ran = self._clock()
        taken: list[int | None] = []
        try:
            for guess in [*guesses, None]:
                taken.append(take(logits[len(taken)]))
                if guess is None or taken[-1] != guess:
                    break
        finally:
            self._decoding.cache.truncate(self._row, past + len(taken))
        accepted = sum(guess == token for guess, token in zip(guesses, taken, strict=False))
        outcome = Outcome(
            guesses=len(guesses),
            tried=accepted if taken[-1] is None else len(guesses),
            accepted=accepted,
            tokens=len(taken),
            draft_ms=(guessed - planned) * 1e3,
            run_ms=(ran - guessed) * 1e3,
            other_ms=(self._clock() - ran + planned - started) * 1e3,
        )
        self._pace.ran(kind, outcome)
        self._compare(taken[0])
        self._count(plan, outcome)
        return len(taken)

    def _plan(self, ids: Sequence[int], most: int) -> tuple[int | None, Plan]:
        """Which kind of guess the draft has, and how many to run."""
        kind = None if self._draft is None else self._draft.kind(ids)
        if self._draft is None or kind is None:
            return None, self._pace.plan(None, 0, lambda _: 0.0)
        room = self._n_ctx - int(self._decoding.cache.lengths[self._row]) - 1
        if self._pace.exact:
            room -= 1  # no token has another beside it in the context's last place: none may come there as a guess
        draft = self._draft
        plan = self._pace.plan(kind, min(most - 1, room), draft.expected_ms, catch_up_ms=lambda: draft.catch_up_ms(ids))
        return kind, plan

    def _guess(self, ids: Sequence[int], kind: int | None, plan: Plan) -> list[int]:
        """Guesses to run. Where there are to be none, the draft may still be asked, to see whether it is right."""
        draft = self._draft
        if draft is None or kind is None:
            return []
        if plan.guesses:
            self._watch = None
            return draft.propose(ids, plan.guesses)
        if self._watch is None and self._pace.may_watch(
            draft.expected_ms(WATCHED_TOKENS), catch_up_ms=lambda: draft.catch_up_ms(ids)
        ):
            self._watch = _Watch(kind, draft.propose(ids, WATCHED_TOKENS))
        return []

    def _run(self, last: int, guesses: list[int]) -> NDArray[np.float32]:
        """Logits [S, V] behind the last token, behind each guess, and behind what fills the piece up."""
        room = self._n_ctx - int(self._decoding.cache.lengths[self._row])
        size = min(self._pace.run_size(len(guesses)), max(1, room))
        piece = [last, *guesses]
        piece += [last] * (size - len(piece))
        (logits,) = self._decoding.append(self._row, np.array(piece, np.int64))
        return logits

    def _compare(self, token: int | None) -> None:
        """Go on with the guesses under watch, which a run with guesses has ended."""
        watch = self._watch
        if watch is None:
            return
        right = watch.accepted < len(watch.guesses) and token == watch.guesses[watch.accepted]
        watch.accepted += right
        if not right or watch.accepted == len(watch.guesses):
            self._pace.watched(watch.kind, watch.accepted, tried=len(watch.guesses))
            self._watch = None

    def _count(self, plan: Plan, outcome: Outcome) -> None:
        self._runs += 1
        self._tokens += outcome.tokens
        self._drafted += outcome.guesses
        self._accepted += outcome.accepted
        if outcome.guesses and plan.ms is not None:
            self._drafting_tokens += outcome.tokens
            self._drafting_ms += outcome.draft_ms + outcome.run_ms + outcome.other_ms
            self._predicted_tokens += plan.tokens
            self._predicted_ms += plan.ms


def speculative_tokens(
    speculation: Speculation,
    prompt: Sequence[int],
    logits: NDArray[np.float32],
    choose: Choose,
    *,
    max_new_tokens: int,
    end: int | None = None,
) -> Iterator[int]:
    """Write a text.

    Args:
        speculation: its row holds the prompt.
        prompt: its ids.
        logits: [V] behind it.
        choose: the target's choice.
        max_new_tokens: the most that is written.
        end: the id that ends a text.
    Yields:
        The new ids, the end included; several follow at once where they were guessed.
    """
    ids = list(prompt)

    def take(behind: NDArray[np.float32]) -> int | None:
        ids.append(choose(ids, behind))
        return ids[-1] if ids[-1] != end else None

    ended = take(logits) is None
    yield ids[-1]
    while not ended and (most := len(prompt) + max_new_tokens - len(ids)):
        taken = speculation.step(ids, take, most=most)
        yield from ids[-taken:]
        ended = ids[-1] == end
