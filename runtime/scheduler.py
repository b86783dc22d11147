"""The loop: rows run in the slots of one cache, and a slot whose row has ended is used again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from .decoder import Decoder
from .prefix_cache import PrefixCache, prefill
from .row import Row
from .speculation import Speculation
from .speculator import Speculator


class Scheduler:
    """Slots of one cache, and the rows under way in them."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        slots: int,
        capacity: int | None = None,
        prefix_cache: PrefixCache | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        """Reserve a cache.

        Args:
            decoder: the model.
            slots: rows that may run together.
            capacity: tokens that a row has room for at first; None where it is not known which rows will come. The
                cache grows when a row needs more.
            prefix_cache: knows the beginnings of earlier prompts.
            speculator: what the one row that there will be may guess by.
        Raises:
            RequestError: no slots, or a capacity beyond the context.
            MachineError: the memory cannot be had.
        """
        assert speculator is None or slots == 1, "guesses are for one row"
        self._prefix_cache = prefix_cache
        self._speculator = speculator
        self._speculation: Speculation | None = None
        self._decoding = decoder.start(batch=slots, capacity=capacity or 1, unforeseen=capacity is None and slots > 1)
        self._rows: list[Row] = []  # by slot; between steps some may have ended

    def run(self, take: Callable[[], Row | None]) -> Iterator[list[Row]]:
        """Run rows until all have ended.

        Args:
            take: gives the next row that waits for a slot; None where there is none for now.
        Yields:
            The rows that a step has changed: they have a token more, or have ended. Rows that were taken together
            change together, at most as many as there are slots; then all that are going, with one token each.
        Raises:
            MachineError: the device failed; no row can go on.
        """
        while True:
            changed = [row for row in self._rows if not row.ended and row.interrupted()]
            changed += self._reencode()
            changed += self._admit(take)
            if changed:
                yield changed
            self._close_gaps()
            if self._rows and not any(row.is_full for row in self._rows):  # a prompt may fill the context at once
                yield self._step()
            elif not changed:
                return

    def _step(self) -> list[Row]:
        """One token for each row, in one run; or for the only row all those that were guessed right, and one more."""
        rows = list(self._rows)
        if self._speculation is not None:
            row = rows[0]
            self._speculation.step(row.ids, row.take, most=row.job.max_new_tokens - len(row.times))
            row.speculation = self._speculation.stats
            return rows
        ids = np.array([row.ids[-1] for row in rows], np.int64)
        wanted = [row.job.wanted for row in rows]
        most = max((count for count in wanted if count is not None), default=None)
        logits = self._decoding.decode_step(ids, wanted=None if None in wanted else most)  # [B, V]
        for row, own in zip(rows, logits, strict=True):
            row.advance(own)
        return rows

    def _reencode(self) -> list[Row]:
        full = [(slot, row) for slot, row in enumerate(self._rows) if not row.ended and row.is_full]
        for slot, row in full:
            self._place(slot, row)
        return [row for _, row in full]

    def _admit(self, take: Callable[[], Row | None]) -> list[Row]:
        admitted: list[Row] = []
        left = (slot for slot, row in enumerate(self._rows) if row.ended)
        for slot in chain(left, range(len(self._rows), self._decoding.cache.batch)):
            row = take()
            if row is None:
                break
            self._rows[slot : slot + 1] = [row]
            self._place(slot, row)
            admitted.append(row)
        return admitted

    def _place(self, slot: int, row: Row) -> None:
        """Run a row's ids from position 0, and take the token behind them."""
        if row.interrupted():
            return
        if row.is_full:
            row.slide()
        self._decoding.reserve(row.job.capacity)
        logits = self._copied(slot, row)
        if logits is None:
            logits = self._prefilled(slot, row)
        if logits is not None:
            row.advance(logits)
            if self._speculator is not None and self._speculation is None:
                self._speculation = self._speculator.begin(self._decoding, slot, row)

    def _prefilled(self, slot: int, row: Row) -> NDArray[np.float32] | None:
        """Logits [V] behind the row's ids; None if it was interrupted."""
        self._decoding.cache.lengths[slot] = 0
        logits = prefill(
            self._decoding,
            slot,
            np.array(row.ids[row.start :], np.int64),
            prefixes=None if row.times else self._prefix_cache,
            interrupted=row.interrupted,
        )
        if logits is not None and row.job.request.num_return_sequences > 1 and not row.times:
            row.job.prompt_logits = logits.copy()
        return logits

    def _copied(self, slot: int, row: Row) -> NDArray[np.float32] | None:
        """Take the prompt's keys and values from another sample of it; returns the logits [V], None where none runs."""
        logits, tokens = row.job.prompt_logits, len(row.ids) - row.start
        if row.times or logits is None:
            return None
        cache = self._decoding.cache
        for source, other in enumerate(self._rows):
            same_text = other.job is row.job and other.start == row.start and cache.lengths[source] >= tokens
            if other is not row and same_text:
                cache.copy_row(source, slot, tokens=tokens)
                return np.copy(logits)
        return None

    def _close_gaps(self) -> None:
        """Move rows from the end into the slots of those that have ended: a step runs the first slots, all going."""
        for slot in reversed(range(len(self._rows))):
            if self._rows[slot].ended:
                last = self._rows.pop()
                if slot < len(self._rows):
                    self._decoding.cache.copy_row(len(self._rows), slot)
                    self._rows[slot] = last
