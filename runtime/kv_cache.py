"""The only place where keys and values live: two buffers per layer, in which each row has its own length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .cache_memory import CacheMemory, untouched_memory
from .config import GPT2Config
from .errors import MachineError, RequestError
from .package import CACHE_KINDS, CacheType, past_name, present_name

Buffer: TypeAlias = "NDArray[np.float32] | NDArray[np.int8]"

GROWTH = 1.5
"""A cache that is outgrown becomes this many times as long, so that appending stays linear in the length."""

SPARE_TOKENS = 256
"""Memory is reserved for a multiple of so many tokens, so that a request a little longer than the last fits into it."""


class KVCache:
    """Keys and values of B rows, each row at its own length.

    Each layer has two buffers [B, H, M, D] float32 or int8, M tokens long. Memory that holds no token yet is zero, or
    of an earlier cache. `lengths` [B] int64 counts the tokens of each row; it belongs to whoever runs the graph.
    """

    def __init__(
        self,
        config: GPT2Config,
        *,
        batch: int,
        capacity: int,
        cache_type: CacheType = "float32",
        memory: CacheMemory | None = None,
        unforeseen: bool = False,
    ) -> None:
        """Reserve room for `capacity` tokens in each of `batch` rows, in memory of its own where none is lent.

        Rows that are `unforeseen` have room for whole contexts, where the system takes the memory only as it is
        written: to grow while others run takes seconds (774M, 8 rows of 278 tokens: 2.7 s).

        Raises:
            RequestError: no rows, or a capacity that is not 1 to n_ctx.
            MachineError: the memory cannot be had.
        """
        if batch < 1 or not 1 <= capacity <= config.n_ctx:
            raise RequestError(
                f"a cache of {batch} rows with room for {capacity} tokens each, expected 1 row or more, and 1 to "
                f"{config.n_ctx} tokens, the model's context"
            )
        self._config = config
        self._dtype = np.dtype(cache_type)
        self._memory = memory or CacheMemory(0)
        self.batch = batch
        whole = self._untouched() if unforeseen else None
        self._buffers = self._allocate(capacity) if whole is None else whole
        self.lengths = np.zeros(batch, np.int64)

    @property
    def capacity(self) -> int:
        """M: tokens that a row has room for."""
        return int(self._buffers[0].shape[2])

    def reserve(self, tokens: int) -> bool:
        """Make room for rows of `tokens` tokens.

        Returns:
            True if the buffers moved, and whoever bound them must bind them again.
        Raises:
            MachineError: the memory cannot be had; the cache is as it was.
        """
        if tokens <= self.capacity:
            return False
        assert tokens <= self._config.n_ctx, "whoever runs the graph refuses what the context cannot hold"
        capacity = max(tokens, min(int(self.capacity * GROWTH), self._config.n_ctx))
        grown, used = self._allocate(capacity), int(self.lengths.max())
        for old, new in zip(self._buffers, grown, strict=True):
            new[:, :, :used] = old[:, :, :used]
        self._buffers = grown
        return True

    def bindings(self, rows: slice) -> Iterator[tuple[str, str, Buffer]]:
        """The graph's input and output name of each buffer, and its part [rows, H, M, D], which is contiguous."""
        for index, buffer in enumerate(self._buffers):
            layer, kind = divmod(index, len(CACHE_KINDS))
            yield past_name(layer, CACHE_KINDS[kind]), present_name(layer, CACHE_KINDS[kind]), buffer[rows]

    def copy_row(self, source: int, target: int, *, tokens: int | None = None) -> None:
        """Make a row equal to another one, or to the first `tokens` tokens of it."""
        length = int(self.lengths[source]) if tokens is None else tokens
        assert length <= self.lengths[source], "the source holds fewer tokens than are to be copied"
        for buffer in self._buffers:
            buffer[target, :, :length] = buffer[source, :, :length]
        self.lengths[target] = length

    def row(self, row: int) -> Buffer:
        """What a row holds: [buffers, H, P, D], a view."""
        return self._buffers[:, row, :, : self.lengths[row]]

    def extend(self, row: int, tokens: Buffer) -> None:
        """Copy the keys and values of further tokens behind a row's, [buffers, H, T, D] as `row` gives them."""
        start = int(self.lengths[row])
        end = start + tokens.shape[2]
        assert end <= self.capacity, "whoever runs the graph makes room first"
        self._buffers[:, row, :, start:end] = tokens
        self.lengths[row] = end

    def truncate(self, row: int, length: int) -> None:
        """Forget what a row holds beyond its first `length` tokens."""
        assert 0 <= length <= self.lengths[row], "a row cannot be cut to more than it holds"
        self.lengths[row] = length

    def take_rows(self, sources: NDArray[np.int64]) -> None:
        """Give each row what row sources[row] holds, [B] int64; a row that keeps its own costs nothing."""
        rows = np.flatnonzero(sources != np.arange(self.batch))
        if not rows.size:
            return
        length = int(self.lengths[sources[rows]].max())
        for buffer in self._buffers:
            buffer[rows, :, :length] = buffer[sources[rows], :, :length]
        self.lengths[rows] = self.lengths[sources[rows]]

    def _allocate(self, capacity: int) -> Buffer:
        """All buffers in one piece: the system refuses one request beyond its memory, but grants many small ones."""
        config = self._config
        token_items = config.cache_items_per_token * self.batch
        spare_tokens = min(-capacity % SPARE_TOKENS, config.n_ctx - capacity)
        try:
            lent = self._memory.lend(capacity * token_items, self._dtype, spare_items=spare_tokens * token_items)
            return lent.reshape(self._shape(capacity))
        except (MemoryError, ValueError, OverflowError) as error:  # the last two: more than numpy can number
            needed = config.cache_items_per_token * self._dtype.itemsize * capacity * self.batch
            raise MachineError(
                f"no memory for a cache of {capacity} tokens x {self.batch} rows ({needed:,} bytes); ask for fewer "
                "samples at once, or fewer tokens"
            ) from error

    def _untouched(self) -> Buffer | None:
        """All buffers, for rows of whole contexts; None where they cannot be had without their memory."""
        n_ctx = self._config.n_ctx
        items = untouched_memory(n_ctx * self._config.cache_items_per_token * self.batch, self._dtype)
        return None if items is None else items.reshape(self._shape(n_ctx))

    def _shape(self, capacity: int) -> tuple[int, ...]:
        """[buffers, B, H, M, D]."""
        config = self._config
        return len(CACHE_KINDS) * config.n_layer, self.batch, config.n_head, capacity, config.head_dim
