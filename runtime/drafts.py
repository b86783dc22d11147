"""Drafts: cheap guesses how a text goes on, for a model to check several of them in one run.

`PromptLookup` finds what followed the last tokens where they stood before: in the prompt, or in what was written.
`DraftPackage` lets a smaller model of the same vocabulary write ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .decoder import Decoder
from .draft_pace import RunCosts
from .errors import RequestError
from .package import TOKENIZER, Package
from .tokenizer import Tokenizer

Choose: TypeAlias = "Callable[[Sequence[int], NDArray[np.float32]], int]"
"""The next id, from the ids so far and the logits [V] behind them, which it may change. The same again for the same."""

MATCH_TOKENS = (8, 4, 2, 1)
"""How many of the last tokens are looked up, the most first: the more agree, the likelier the next ones do."""

TIMED_RUNS = 3
"""Runs of one token when a draft package is taken up, so that what it costs is known before it is asked."""


class Draft(Protocol):
    """Guesses how one text goes on: made for it, and asked as it grows.

    `ids` is the text so far, prompt included; from call to call it only grows. So what has become of the last guesses
    is seen there.
    """

    def kind(self, ids: Sequence[int]) -> int | None:
        """Which kind of guess it has here: those of one kind are taken to be right equally often. None: it has none."""
        ...

    def expected_ms(self, count: int) -> float:
        """What `count` guesses take where it has followed the text."""
        ...

    def catch_up_ms(self, ids: Sequence[int]) -> float:
        """What it takes before that, once, to read what it has missed."""
        ...

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """Guess the next ids: `count`, or fewer where it cannot see so far."""
        ...


class PromptLookup:
    """Copies what followed the last tokens when they stood in the text before, the last time."""

    def __init__(self) -> None:
        self._behind: dict[tuple[int, ...], int] = {}  # some tokens -> the place behind them, where they stood last
        self._known = 0  # ids whose predecessors are in there

    def kind(self, ids: Sequence[int]) -> int | None:
        found = self._find(ids)
        return None if found is None else found[0]

    def expected_ms(self, count: int) -> float:
        """Some microseconds, which are nothing beside a run."""
        return 0.0

    def catch_up_ms(self, ids: Sequence[int]) -> float:
        """Likewise."""
        return 0.0

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        found = self._find(ids)
        if found is None:
            return []
        _, source = found
        proposed: list[int] = []
        for place in range(source, source + count):
            # A match that reaches to the end is a text that goes round: so do the guesses.
            proposed.append(ids[place] if place < len(ids) else proposed[place - len(ids)])
        return proposed

    def _find(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """Which of `MATCH_TOKENS` agree, and the place behind them."""
        self._learn(ids)
        for kind, size in enumerate(MATCH_TOKENS):
            if size <= len(ids) and (place := self._behind.get(tuple(ids[-size:]))):
                return kind, place
        return None

    def _learn(self, ids: Sequence[int]) -> None:
        """Enter the tokens before each new id: those at the end must wait until something stands behind them."""
        for place in range(max(1, self._known), len(ids)):
            for size in MATCH_TOKENS:
                if size <= place:
                    self._behind[tuple(ids[place - size : place])] = place
        self._known = len(ids)


class DraftPackage:
    """A loaded package that drafts for another; texts, and threads, share it."""

    def __init__(self, decoder: Decoder, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """Time it on a few tokens. `check_same_tokenizer` tells whether it can draft for a package.

        Args:
            decoder: its model.
            clock: seconds from any beginning.
        """
        self.decoder = decoder
        self.costs = RunCosts()
        self.clock = clock
        decoding = decoder.start(batch=1, capacity=min(TIMED_RUNS, decoder.config.n_ctx))
        for _ in range(decoding.cache.capacity):
            started = clock()
            decoding.prefill(0, np.zeros(1, np.int64))
            self.costs.observe(1, (clock() - started) * 1e3)

    def for_text(self, choose: Choose, *, capacity: int = 1) -> PackageDraft:
        """Draft one text.

        Args:
            choose: how it takes its guesses; right most often when it takes them as the target does: the same options,
                the same random numbers.
            capacity: tokens that the text will have, if known; the cache grows where it must.
        """
        return PackageDraft(self, choose, capacity)


class PackageDraft:
    """Writes ahead with a package of its own, whose cache it keeps in step with the text."""

    def __init__(self, package: DraftPackage, choose: Choose, capacity: int) -> None:
        """`DraftPackage.for_text` makes it."""
        self._package = package
        self._choose = choose
        self._n_ctx = package.decoder.config.n_ctx
        self._decoding = package.decoder.start(batch=1, capacity=min(capacity, self._n_ctx))
        self._held: list[int] = []  # ids whose keys and values are in the cache
        self._agreed = 0  # of them, those that are known to be the text's

    def kind(self, ids: Sequence[int]) -> int | None:
        return 0 if len(ids) <= self._n_ctx else None

    def expected_ms(self, count: int) -> float:
        return count * self._package.costs.ms(1)

    def catch_up_ms(self, ids: Sequence[int]) -> float:
        missed = len(ids) - self._agree(ids)
        costs = self._package.costs
        return costs.ms(missed) - costs.ms(1) if missed > 1 else 0.0

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        agreed = self._agree(ids)
        self._decoding.cache.truncate(0, agreed)
        del self._held[agreed:]
        text = list(ids)
        for _ in range(min(count, self._n_ctx - len(ids) + 1)):  # the last guess is not run
            try:
                text.append(self._next(text))
            except RequestError:  # no token may follow here; if the text itself comes so far, it is told there
                break
        return text[len(ids) :]

    def _next(self, text: list[int]) -> int:
        """Run what is new of the text, and choose what follows."""
        clock = self._package.clock
        started = clock()
        new = text[len(self._held) :]
        logits = self._decoding.prefill(0, np.array(new, np.int64))
        self._held += new
        chosen = self._choose(text, logits)
        self._package.costs.observe(len(new), (clock() - started) * 1e3)
        return chosen

    def _agree(self, ids: Sequence[int]) -> int:
        """How many of the held ids are the text's; its last is never counted, for it must be run to go on."""
        start = min(self._agreed, len(ids) - 1)
        pairs = zip(self._held[start:], ids[start:-1], strict=False)
        self._agreed = start + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return self._agreed


def check_same_tokenizer(draft: Package, target: Package) -> None:
    """Refuse a draft whose ids stand for other text than the target's.

    Raises:
        RequestError: the tokenizers differ.
        TokenizerError: one of them cannot be read.
    """
    if draft.manifest.files[TOKENIZER] == target.manifest.files[TOKENIZER]:
        return
    ours, theirs = (Tokenizer.load(package.tokenizer_path) for package in (target, draft))
    shared = min(ours.n_vocab, theirs.n_vocab)
    if ours.n_vocab != theirs.n_vocab:
        difference = f"{theirs.n_vocab} tokens against {ours.n_vocab}"
    elif other := [i for i in range(shared) if ours.token_bytes(i) != theirs.token_bytes(i)]:
        first = other[0]
        difference = f"token {first} is {theirs.token_bytes(first)!r} against {ours.token_bytes(first)!r}"
    else:
        return
    raise RequestError(
        f"{draft.folder} cannot draft for {target.folder}: its tokenizer is another one ({difference}); draft with a "
        "package of the same vocabulary"
    )
