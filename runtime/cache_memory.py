"""Memory of caches that are done with, kept for the next one.

Fresh memory is zeroed page by page as it is written, and a virtual machine may have to fetch each page from its host
first: for the 59 MB of a 774M cache of 160 tokens that took 6 ms to 70 ms of a first token of 190 ms.
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


def untouched_memory(n_items: int, dtype: DTypeLike) -> NDArray[Any] | None:
    """Zeros [n_items] whose memory is taken as they are written, a few KB at a time; None where none are to be had so.

    numpy's own zeros are taken 2 MiB at a time, where the system has huge pages.
    """
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):  # not Linux
        return None
    try:
        block = mmap.mmap(-1, n_items * np.dtype(dtype).itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError):  # the last two: more than the system can number
        return None
    with suppress(OSError):  # a system without huge pages
        block.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(block, dtype)


class CacheMemory:
    """Lends memory, and keeps one block of what came back. Threads may share it."""

    def __init__(self, most_bytes: int) -> None:
        """Keep a block of `most_bytes` at most: larger ones go back to the system."""
        self._most_bytes = most_bytes
        self._kept: list[NDArray[np.uint8]] = []  # a list, since its pop and append need no lock

    def lend(self, n_items: int, dtype: DTypeLike, *, spare_items: int = 0) -> NDArray[Any]:
        """An array [n_items] until nothing refers to it or to a part of it.

        Args:
            n_items: 1 or more.
            dtype: of the items, which are zero or what an earlier cache of this memory left there.
            spare_items: where memory is allocated that may be kept, reserve so many more, for a larger cache later.
        Raises:
            MemoryError, ValueError, OverflowError: the memory cannot be had.
        """
        item_bytes = np.dtype(dtype).itemsize
        n_bytes = n_items * item_bytes
        block = self._take(n_bytes)
        if block is None:
            with_spare = n_bytes + spare_items * item_bytes
            block = np.zeros(with_spare if with_spare <= self._most_bytes else n_bytes, np.uint8)
        # Parts of an array over a buffer refer to this array, whose end is so the end of them all.
        lent = np.frombuffer(block.data, dtype, count=n_items)
        weakref.finalize(lent, self._keep, block).atexit = False  # at the exit arrays in use are finalized too
        return lent

    def _take(self, n_bytes: int) -> NDArray[np.uint8] | None:
        """The kept block if it is large enough; it is let go where it is not, so that no two are held."""
        try:
            block = self._kept.pop()
        except IndexError:
            return None
        return block if block.nbytes >= n_bytes else None

    def _keep(self, block: NDArray[np.uint8]) -> None:
        if block.nbytes <= self._most_bytes and not self._kept:
            self._kept.append(block)
