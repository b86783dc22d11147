"""Many requests through the slots of one cache: read as slots fall free, given back in order or as they end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeAlias

from .errors import GPT2EdgeError
from .request import Generation, Prompt, Request
from .row import Job, Row
from .scheduler import Scheduler

RESULTS_AHEAD = 32
"""Results for each slot that may wait for an earlier one; then no request is read until that one has ended. A result is
some kilobytes, and a slot stands empty only where one request takes as long as 32 others."""

Item: TypeAlias = "Request | Prompt | GPT2EdgeError"
"""An error stands for a request that could not even be read."""

OnError = Literal["raise", "return"]


class Batch:
    """Requests, each read when a slot waits for a row, and those results that are not yet given back."""

    def __init__(self, items: Iterable[Item], *, prepare: Callable[[Request, int], Job], ahead: int) -> None:
        self._items = enumerate(items)
        self._prepare = prepare
        self._ahead = ahead
        self._waiting: Iterator[Row] = iter(())  # samples of the request that was read last
        self._finished: dict[int, Generation] = {}
        self._next_index = 0
        self.exhausted = False

    def run(self, scheduler: Scheduler, *, ordered: bool, on_error: OnError) -> Iterator[Generation]:
        """Give the results back; arguments and errors as `TextGenerator.generate_many`."""
        while not self.exhausted:  # bad requests alone can fill what may wait: then no row runs, and there are more
            for changed in scheduler.run(self._take):
                self._collect(changed)
                yield from self._results(ordered=ordered, on_error=on_error)
            yield from self._results(ordered=ordered, on_error=on_error)

    def _take(self) -> Row | None:
        while (row := next(self._waiting, None)) is None:
            if len(self._finished) >= self._ahead or not self._read():
                return None
        return row

    def _read(self) -> bool:
        """Read one more request; false where there is none."""
        numbered = next(self._items, None)
        if numbered is None:
            self.exhausted = True
            return False
        index, item = numbered
        try:
            if isinstance(item, GPT2EdgeError):
                raise item
            self._waiting = self._prepare(item if isinstance(item, Request) else Request(item), index).new_rows()
        except GPT2EdgeError as error:
            self._fail(index, error)
        return True

    def _collect(self, changed: list[Row]) -> None:
        for job in {row.job.index: row.job for row in changed if row.job.ended}.values():
            try:
                self._finished[job.index] = job.generation()
            except GPT2EdgeError as error:
                self._fail(job.index, error)

    def _fail(self, index: int, error: GPT2EdgeError) -> None:
        self._finished[index] = Generation(prompt_ids=(), seed=0, samples=(), index=index, error=error)

    def _results(self, *, ordered: bool, on_error: OnError) -> Iterator[Generation]:
        while self._finished and (not ordered or self._next_index in self._finished):
            index = self._next_index if ordered else next(iter(self._finished))
            result = self._finished.pop(index)
            self._next_index += 1
            if result.error is not None and on_error == "raise":
                raise type(result.error)(f"request {index}: {result.error}") from result.error
            yield result
