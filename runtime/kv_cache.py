"""The only place where keys and values live: two buffers per layer, in which each row has its own length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .cache_memory import CacheMemory
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
    ) -> None:
        """Reserve room for `capacity` tokens in each of `batch` rows, in memory of its own where none is lent.

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
        self._buffers = self._allocate(capacity)
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

    def repeat_row(self, rows: slice) -> None:
        """Copy the keys, values and length of the first of these rows into the others."""
        length = int(self.lengths[rows.start])
        for buffer in self._buffers:
            buffer[rows, :, :length] = buffer[rows.start, :, :length]
        self.lengths[rows] = length

    def _allocate(self, capacity: int) -> list[Buffer]:
        """All buffers in one piece: the system refuses one request beyond its memory, but grants many small ones."""
        config = self._config
        shape = (len(CACHE_KINDS) * config.n_layer, self.batch, config.n_head, capacity, config.head_dim)
        token_items = config.cache_items_per_token * self.batch
        spare_tokens = min(-capacity % SPARE_TOKENS, config.n_ctx - capacity)
        try:
            lent = self._memory.lend(capacity * token_items, self._dtype, spare_items=spare_tokens * token_items)
            return list(lent.reshape(shape))
        except (MemoryError, ValueError, OverflowError) as error:  # the last two: more than numpy can number
            needed = config.cache_items_per_token * self._dtype.itemsize * capacity * self.batch
            raise MachineError(
                f"no memory for a cache of {capacity} tokens x {self.batch} rows ({needed:,} bytes); ask for fewer "
                "samples at once, or fewer tokens"
            ) from error
