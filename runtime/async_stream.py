"""An iterator that computes, read from an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

from .request import Cancellation


class Abandonment:
    """Set when the reader has gone away; it counts as set, too, when the caller's own cancellation is."""

    def __init__(self, cancel: Cancellation | None) -> None:
        self._cancel = cancel
        self._abandoned = threading.Event()

    def set(self) -> None:
        self._abandoned.set()

    def is_set(self) -> bool:
        return self._abandoned.is_set() or (self._cancel is not None and self._cancel.is_set())


async def read_in_threads(pieces: Iterator[str], abandonment: Abandonment) -> AsyncIterator[str]:
    """Pass on what an iterator yields; each piece is computed in a worker thread, when the reader asks for it.

    A reader that goes away while one is computed leaves it to its thread, where `abandonment` ends it.
    """
    try:
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece
    finally:
        abandonment.set()
