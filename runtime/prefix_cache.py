"""Keys and values of prompts that were run, kept for prompts that begin alike.

Kept in blocks of tokens: a block belongs to all prompts that are the same up to its end, so a beginning that many share
is kept once. A prompt's blocks that are there are copied into its row, and only the rest is run. That changes no bit of
the result: all the blocks' tokens were run in pieces of two or more, and so is the rest, at least two tokens of which
are left to be run (see `decoder.pieces`).
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from .decoder import Decoder, Decoding
from .errors import RequestError
from .kv_cache import Buffer

BLOCK_TOKENS = 16
"""A prompt that begins like another up to any token runs half of this again on the average."""

REST_TOKENS = 2
"""The fewest tokens that are run: a token run alone rounds differently."""


class PrefixCache:
    """Blocks of one decoder's keys and values, `max_bytes` of them at most. Threads may share it.

    The block that was not used for the longest time goes first. Whoever uses a block has used all before it, which are
    taken to be used a moment later: so the end of a prompt goes before its beginning, without which it is of no use.
    """

    def __init__(self, decoder: Decoder, *, max_bytes: int) -> None:
        """Begin empty.

        Raises:
            RequestError: max_bytes is no room for a single block; names how much one takes.
        """
        self.decoder = decoder
        items = decoder.config.cache_items_per_token * BLOCK_TOKENS
        self._block_bytes = items * np.dtype(decoder.kv_cache).itemsize
        if type(max_bytes) is not int or max_bytes < self._block_bytes:
            raise RequestError(
                f"a prefix cache of {max_bytes!r} bytes, expected {self._block_bytes:,} or more, which {BLOCK_TOKENS} "
                "tokens of this model take"
            )
        self._max_blocks = max_bytes // self._block_bytes
        self._blocks: OrderedDict[bytes, Buffer] = OrderedDict()  # the next to go first
        self._lock = threading.Lock()
        self.reused_tokens = 0
        """Tokens that were not run, of all prompts so far."""

    @property
    def held_bytes(self) -> int:
        """What the keys and values take now."""
        return len(self._blocks) * self._block_bytes

    def insert(self, decoding: Decoding, row: int, ids: NDArray[np.int64]) -> int:
        """Put what is known of a prompt's beginning into an empty row.

        Returns:
            How many tokens; at least `REST_TOKENS` of the prompt are left to be run.
        Raises:
            MachineError: the memory cannot be had.
        """
        assert not decoding.cache.lengths[row], "a prompt begins in an empty row"
        blocks: list[Buffer] = []
        with self._lock:
            keys = list(_keys(ids[:-REST_TOKENS]))
            for key in keys:
                if key not in self._blocks:
                    break
                blocks.append(self._blocks[key])
            self._use(keys[: len(blocks)])
            self.reused_tokens += len(blocks) * BLOCK_TOKENS
        for block in blocks:  # nobody writes into a block, and one that goes meanwhile lives as long as this list
            decoding.insert(row, block)
        return len(blocks) * BLOCK_TOKENS

    def store(self, decoding: Decoding, row: int, ids: NDArray[np.int64]) -> None:
        """Keep the keys and values of a prompt that was run into a row in pieces of two or more, `insert`ed or not.

        Of a prompt that is larger than the cache, the beginning is kept.
        """
        if len(ids) < REST_TOKENS:
            return
        keys = list(_keys(ids))[: self._max_blocks]
        past = decoding.cache.row(row)
        with self._lock:
            self._use([key for key in keys if key in self._blocks])  # so that none of these goes
            missing = [place for place, key in enumerate(keys) if key not in self._blocks]
            while len(self._blocks) + len(missing) > self._max_blocks:
                self._blocks.popitem(last=False)
            for place in missing:
                block = past[:, :, place * BLOCK_TOKENS : (place + 1) * BLOCK_TOKENS]
                self._blocks[keys[place]] = block.copy()
            self._use(keys)

    def _use(self, keys: list[bytes]) -> None:
        """Make these blocks of one prompt the last to go, its first block the very last."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)


def prefill(
    decoding: Decoding,
    row: int,
    ids: NDArray[np.int64],
    *,
    prefixes: PrefixCache | None,
    interrupted: Callable[[], bool] = lambda: False,
) -> NDArray[np.float32] | None:
    """Run a prompt, piece by piece, but for what is known of its beginning; bit for bit as without the knowledge.

    Args:
        decoding: has the row.
        row: empty, where there is a prefix cache.
        ids: [T] int64, T >= 1.
        prefixes: knows the beginnings of earlier prompts, and will know this one's; None for none.
        interrupted: asked behind each piece.
    Returns:
        Logits [V] float32 after the last id, valid until the next run; None if it was interrupted: the row holds what
        was run.
    Raises:
        RequestError: as `Decoding.append`.
        MachineError: the memory cannot be had.
    """
    known = 0 if prefixes is None else prefixes.insert(decoding, row, ids)
    for piece in decoding.append(row, ids[known:], last_only=True):
        if interrupted():
            return None
        logits: NDArray[np.float32] = piece[-1]
    if prefixes is not None:
        prefixes.store(decoding, row, ids)
    return logits


def _keys(ids: NDArray[np.int64]) -> Iterator[bytes]:
    """The key of each whole block: a digest of all ids up to its end."""
    digest, spelled = hashlib.sha256(), np.ascontiguousarray(ids, "<i8")
    for end in range(BLOCK_TOKENS, len(spelled) + 1, BLOCK_TOKENS):
        digest.update(spelled[end - BLOCK_TOKENS : end].tobytes())
        yield digest.digest()
