"""The model without text: token ids in, logits out, keys and values kept in a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .activations import WIDE, Activations
from .cache_memory import CacheMemory
from .config import GPT2Config
from .errors import MachineError, RequestError
from .huge_pages import Gathering, gather, private_regions
from .kv_cache import Buffer, KVCache
from .package import (
    ATTENTION_MASK,
    CACHE_ITEM_BYTES,
    INPUT_IDS,
    LOGITS,
    NUM_LOGITS_TO_KEEP,
    POSITION_IDS,
    Attention,
    CacheType,
    ShapeProfile,
)
from .place import CPU, Place
from .provider import CPU_PROVIDER
from .session import Opened, giving_back, open_session
from .tensorrt_options import check_fits
from .wheel import load_onnxruntime

CHUNK_TOKENS = 192
"""Prompts are run in pieces of this many tokens. What 900 tokens took in pieces of 64, 128, 192, 256, 512 and in one,
with onnxruntime 1.32.0: 774M int8 3.26, 2.95, 2.79, 2.80, 2.90, 3.17 s; with int8 keys and values 4.03, 3.88, 3.89,
4.02, 4.28, 5.12 s; 124M int8 0.67, 0.60, 0.55, 0.55, 0.57, 0.55 s."""

ATTENTION_ROWS_PER_DIM = 2
"""Tokens that onnxruntime's attention takes at a time, for each dimension of a head: 128 with the 64 of every official
size. Of pieces of 2 to 299 tokens, only those with one token behind whole such blocks differed from all others, in the
bits of that token: 33, 65, 97 and so on with heads of 16, 97, 193 and 289 with 48, 129 and 257 with 64, 257 with 128
(1.32.0; 1 and 2 threads)."""


class Decoder:
    """A session and the numbers of its model. Threads may share it: what a generation changes is in its Decoding."""

    chunk_tokens = CHUNK_TOKENS
    """Tokens of a piece of a prompt where nothing else is asked for."""

    def __init__(
        self,
        opened: Opened,
        config: GPT2Config,
        attention: Attention = "GroupQueryAttention",
        kv_cache: CacheType = "float32",
        activations: Activations = WIDE,
        *,
        gathering: Gathering | None = None,
        profile: ShapeProfile | None = None,
    ) -> None:
        assert kv_cache != "int8" or attention == "GroupQueryAttention", "plain attention knows floats only"
        self.session = opened.session
        self.receipt = opened.receipt
        self.config = config
        self.attention = attention
        self.kv_cache = kv_cache
        self.activations = activations
        optional = {value.name for value in self.session.get_overridable_initializers()}
        self.keeps_logits = NUM_LOGITS_TO_KEEP in optional
        """Whether the graph can be told how many logits are wanted; one that cannot computes all."""
        self.profile = profile
        self._gathering = gathering
        row_bytes = config.n_ctx * config.cache_items_per_token * CACHE_ITEM_BYTES[kv_cache]
        self._cache_memory = CacheMemory(most_bytes=row_bytes)

    @classmethod
    def open(
        cls,
        model_path: Path,
        config: GPT2Config,
        *,
        attention: Attention = "GroupQueryAttention",
        kv_cache: CacheType = "float32",
        place: Place = CPU,
        threads: int | None = None,
        activations: Activations = WIDE,
        optimized: bool = False,
        takes_turns: bool = False,
        provider_settings: Mapping[str, str] | None = None,
        profile: ShapeProfile | None = None,
    ) -> Decoder:
        """Open a graph; other arguments and errors as `session.open_session`.

        Args:
            profile: the shapes that it was compiled for: what they do not serve is refused, or cut into smaller pieces.
        """
        before = private_regions()
        opened = open_session(
            model_path,
            place=place,
            threads=threads,
            activations=activations,
            optimized=optimized,
            takes_turns=takes_turns,
            provider_settings=provider_settings,
        )
        return cls(opened, config, attention, kv_cache, activations, gathering=gather(since=before), profile=profile)

    def settle(self) -> None:
        """Wait until the weights' memory is as it will stay, see `runtime.huge_pages`; before times are measured."""
        if self._gathering:
            self._gathering.wait()

    @property
    def attention_rows(self) -> int:
        """Tokens that attention takes at a time."""
        return ATTENTION_ROWS_PER_DIM * self.config.head_dim

    def start(self, *, batch: int, capacity: int, unforeseen: bool = False) -> Decoding:
        """Begin with an empty cache, arguments and errors as `KVCache`."""
        cache = KVCache(
            self.config,
            batch=batch,
            capacity=capacity,
            cache_type=self.kv_cache,
            memory=self._cache_memory,
            unforeseen=unforeseen,
        )
        return Decoding(self, cache)

    def logits(self, ids: NDArray[np.int64], *, chunk_tokens: int = CHUNK_TOKENS) -> Iterator[NDArray[np.float32]]:
        """Logits after every token of one sequence, piece by piece; arguments and errors as `Decoding.append`.

        Yields:
            [S, V] float32, valid until the next; the pieces' S add up to T.
        """
        self.check_ids(ids, past=0)
        return self.start(batch=1, capacity=len(ids)).append(0, ids, chunk_tokens=chunk_tokens)

    def check_ids(self, ids: NDArray[np.int64], *, past: int) -> None:
        """Refuse ids that the model cannot run behind `past` others.

        Raises:
            RequestError: no row of whole numbers, no ids, ids out of range, or more than the context holds.
        """
        check_ids_are_known(ids, self.config)
        check_room(past + len(ids), self.config)


class Decoding:
    """Rows under way: a cache, and the graph that reads and fills it, each row at its own length."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder = decoder
        self.cache = cache
        self._bound: dict[tuple[int, int], _Rows] = {}
        self._last = np.empty((cache.batch, 1, decoder.config.n_vocab), np.float32)  # logits [B, 1, V], one set for all

    def prefill(self, row: int, ids: NDArray[np.int64], *, chunk_tokens: int | None = None) -> NDArray[np.float32]:
        """Append ids to one row; arguments and errors as `append`.

        Returns:
            Logits [V] float32 after the last of them, valid until the next call.
        """
        for last in self.append(row, ids, chunk_tokens=chunk_tokens, last_only=True):
            logits: NDArray[np.float32] = last[-1]
        return logits

    def append(
        self, row: int, ids: NDArray[np.int64], *, chunk_tokens: int | None = None, last_only: bool = False
    ) -> Iterator[NDArray[np.float32]]:
        """Append ids to one row, behind whatever it holds, piece by piece.

        Args:
            row: 0 to B - 1.
            ids: [T] int64, T >= 1.
            chunk_tokens: tokens to a piece; None takes the decoder's.
            last_only: compute the logits of a piece's last token only.
        Yields:
            Logits [S, V] float32 of each piece, or [1, V], valid until the next.
        Raises:
            RequestError: no such row, ids out of range, or the row would outgrow the context.
        """
        if not 0 <= row < self.cache.batch:
            raise RequestError(f"no row {row}, expected 0 to {self.cache.batch - 1}")
        past = int(self.cache.lengths[row])
        self._decoder.check_ids(ids, past=past)
        self.reserve(past + len(ids))
        if chunk_tokens is None:
            chunk_tokens = self._decoder.chunk_tokens
        if self._decoder.profile is not None:
            chunk_tokens = min(chunk_tokens, self._decoder.profile["max"][INPUT_IDS][1])
        for piece in pieces(len(ids), chunk_tokens, attention_rows=self._decoder.attention_rows):
            keep = 1 if last_only else piece.stop - piece.start
            ends_long = piece.start > 0 and piece.stop == len(ids)
            yield self._run_piece(row, ids[None, piece], keep=keep, ends_long=ends_long)

    def insert(self, row: int, tokens: Buffer) -> None:
        """Append tokens that this decoder has run before, by their keys and values, behind whatever the row holds.

        Args:
            row: 0 to B - 1.
            tokens: [buffers, H, T, D] as `KVCache.row` gives them; the row must fit the context with them.
        Raises:
            MachineError: the memory cannot be had.
        """
        self.reserve(int(self.cache.lengths[row]) + tokens.shape[2])
        self.cache.extend(row, tokens)

    def decode_step(self, ids: NDArray[np.int64], *, wanted: int | None = None) -> NDArray[np.float32]:
        """Append one id to each of the first rows, each at its own length.

        Args:
            ids: [n] int64, 1 <= n <= B: the rows behind the first n are left as they are.
            wanted: how many of the largest logits of a row matter, None for all: a device may leave out the others,
                this one has them anyway.
        Returns:
            Logits [n, V] float32, valid until the next call.
        Raises:
            RequestError: more ids than rows, an id out of range, or a row would outgrow the context.
        """
        check_ids_are_known(ids, self._decoder.config)
        if len(ids) > self.cache.batch:
            raise RequestError(f"{len(ids)} ids for {self.cache.batch} rows, expected at most one for each")
        longest = int(self.cache.lengths[: len(ids)].max()) + 1
        check_room(longest, self._decoder.config)
        self.reserve(longest)
        return self._run_step(ids[:, None], wanted)

    def reserve(self, tokens: int) -> None:
        """Make room for rows of `tokens` tokens.

        Raises:
            MachineError: the memory cannot be had; all is as it was.
        """
        if self.cache.reserve(tokens):
            self._bound.clear()

    def _run_piece(self, row: int, ids: NDArray[np.int64], *, keep: int, ends_long: bool) -> NDArray[np.float32]:
        """Logits [keep, V] after the last of ids [1, S], for which there is room.

        Behind the last piece of a long prompt, the memory that pieces of it took is given back.
        """
        logits: NDArray[np.float32] = self._rows(row, row + 1).run(ids, keep=keep, gives_back=ends_long)[0]
        return logits

    def _run_step(self, ids: NDArray[np.int64], wanted: int | None) -> NDArray[np.float32]:
        """Logits [n, V] after ids [n, 1], for which there is room."""
        logits: NDArray[np.float32] = self._rows(0, len(ids)).run(ids, keep=1)[:, 0]
        return logits

    def _rows(self, start: int, stop: int) -> _Rows:
        """Some rows, bound when they are first asked for."""
        rows = self._bound.get((start, stop))
        if rows is None:
            rows = _ROWS[self._decoder.attention](self._decoder, self.cache, slice(start, stop), self._last[start:stop])
            self._bound[start, stop] = rows
        return rows


class _Rows:
    """Some rows of a cache, run by the graph: a run binds the mask, and whatever else has another shape than before."""

    def __init__(self, decoder: Decoder, cache: KVCache, rows: slice, last: NDArray[np.float32]) -> None:
        self._session = decoder.session
        self._ort_value = load_onnxruntime().OrtValue.ortvalue_from_numpy  # shares the array's memory on the CPU
        self._n_vocab = decoder.config.n_vocab
        self._keeps_logits = decoder.keeps_logits
        self._lengths = cache.lengths[rows]  # [B] int64, a view
        self._buffers = list(cache.bindings(rows))
        self._profile = decoder.profile
        self._binding = decoder.session.io_binding()
        # other devices copy what is bound
        self._reads_own_memory = decoder.session.get_providers() == [CPU_PROVIDER]
        self._alive: dict[str, NDArray[Any]] = {}  # onnxruntime uses the arrays' own memory: they must outlive the run
        self._last = last  # [B, 1, V]: where the logits go if only the last are kept
        self._logits = np.empty((0, 0, 0), np.float32)

    def run(self, ids: NDArray[np.int64], *, keep: int, gives_back: bool = False) -> NDArray[np.float32]:
        """Append ids [B, S] to the rows; logits [B, keep, V] after the last `keep`, valid until the next run.

        Args:
            gives_back: have onnxruntime give back the memory that it keeps for the next run, on the CPU.
        """
        n_rows, n_new = ids.shape
        self._set_input(INPUT_IDS, ids)
        self._set_input(POSITION_IDS, self._lengths[:, None] + np.arange(n_new))  # [B, S]
        self._set_input(ATTENTION_MASK, self._bind_cache(n_new))  # [B, T]
        if self._profile is not None:
            check_fits(self._profile, rows=n_rows, new_tokens=n_new)
        computed = keep if self._keeps_logits else n_new
        if self._logits.shape != (n_rows, computed, self._n_vocab):
            if self._keeps_logits:
                self._bind_input(NUM_LOGITS_TO_KEEP, np.array([keep], np.int64))
            self._logits = self._last if computed == 1 else np.empty((n_rows, computed, self._n_vocab), np.float32)
            self._bind_output(LOGITS, self._logits)
        try:
            options = giving_back() if gives_back and self._reads_own_memory else None
            self._session.run_with_iobinding(self._binding, options)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise MachineError(f"onnxruntime failed to run the model ({reason}); free memory and run again") from error
        self._take_cache()
        self._lengths += n_new
        return self._logits[:, computed - keep :]

    def _bind_cache(self, n_new: int) -> NDArray[np.bool_]:
        """Have the graph read and write keys and values; returns the mask [B, T], true where a token stands."""
        raise NotImplementedError

    def _take_cache(self) -> None:
        """Put what the last run wrote where it belongs."""

    def _set_input(self, name: str, values: NDArray[np.int64] | NDArray[np.bool_]) -> None:
        """Give the graph numbers; where the array of this shape that is bound is what it reads, they go into that."""
        bound = self._alive.get(name) if self._reads_own_memory else None
        if bound is not None and bound.shape == values.shape:
            bound[...] = values
        else:
            self._alive[name] = np.array(values, np.int64, order="C")
            self._binding.bind_cpu_input(name, self._alive[name])  # half the time of an OrtValue's

    def _bind_input(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_ortvalue_input(name, self._ort_value(array))
        self._alive[name] = array

    def _bind_output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_ortvalue_output(name, self._ort_value(array))
        self._alive[name] = array


class _RowsInPlace(_Rows):
    """The graph writes new keys and values into the cache itself, each row's behind its last: bound once."""

    def __init__(self, decoder: Decoder, cache: KVCache, rows: slice, last: NDArray[np.float32]) -> None:
        super().__init__(decoder, cache, rows, last)
        for past, present, buffer in self._buffers:
            self._bind_input(past, buffer)
            self._bind_output(present, buffer)

    def _bind_cache(self, n_new: int) -> NDArray[np.bool_]:
        ends = self._lengths + n_new  # [B]
        mask: NDArray[np.bool_] = np.arange(ends.max()) < ends[:, None]
        return mask


class _RowsCopied(_Rows):
    """The graph is given a copy of the past and returns a longer one, whose new end is copied back.

    All rows are taken to be as long as the longest, P: the mask hides the zeros behind a shorter one, and positions
    tell the graph where its new tokens stand. Slower than in place by two copies of the cache a run.
    """

    def _bind_cache(self, n_new: int) -> NDArray[np.bool_]:
        n_rows, n_past = len(self._lengths), int(self._lengths.max())
        for past, present, buffer in self._buffers:
            self._bind_input(past, np.ascontiguousarray(buffer[:, :, :n_past]))
            _, n_head, _, head_dim = buffer.shape
            self._bind_output(present, np.empty((n_rows, n_head, n_past + n_new, head_dim), buffer.dtype))
        in_past = np.arange(n_past) < self._lengths[:, None]  # [B, P]
        return np.concatenate([in_past, np.ones((n_rows, n_new), np.bool_)], axis=1)

    def _take_cache(self) -> None:
        n_past = int(self._lengths.max())
        for _, present, buffer in self._buffers:
            new = self._alive[present][:, :, n_past:]  # [B, H, S, D]
            for row, length in enumerate(self._lengths):
                buffer[row, :, length : length + new.shape[2]] = new[row]


_ROWS: Mapping[Attention, type[_Rows]] = {"GroupQueryAttention": _RowsInPlace, "plain": _RowsCopied}


def check_ids_are_known(ids: NDArray[np.int64], config: GPT2Config) -> None:
    """Refuse what is no row of the model's token ids.

    Raises:
        RequestError: no row of whole numbers, no ids, or ids out of range.
    """
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise RequestError(f"token ids have shape {ids.shape} and dtype {ids.dtype}, expected one row of integers")
    if not len(ids):
        raise RequestError("no token ids to run, expected at least one")
    outside = ids[(ids < 0) | (ids >= config.n_vocab)]
    if len(outside):
        raise RequestError(f"token id {outside[0]} is not in the model, expected 0 to {config.n_vocab - 1}")


def check_room(tokens: int, config: GPT2Config) -> None:
    """Refuse a row of more tokens than the context holds.

    Raises:
        RequestError: it is longer than n_ctx.
    """
    if tokens > config.n_ctx:
        raise RequestError(f"{tokens} tokens do not fit the model's context of {config.n_ctx}; shorten the prompt")


def pieces(length: int, chunk_tokens: int, *, attention_rows: int) -> Iterator[slice]:
    """Cut [0, length) into pieces of `chunk_tokens` at most, or of 2 or 3 where less is asked for.

    None is of a single token, unless length is 1, and none leaves a token alone behind whole `attention_rows`: such a
    token takes another path through attention and rounds differently. All other pieces give the same bits.
    """
    start = 0
    while start < length:
        rest = length - start
        size = min(rest, max(2, chunk_tokens))
        while size > 2 and (size % attention_rows == 1 or rest - size == 1):
            size -= 1
        if rest - size == 1:
            size = rest
        yield slice(start, start + size)
        start += size
