"""The decoder on a GPU: keys and values stay there, a step is one captured launch, and only what is wanted travels.

A step runs with a mask of one of few lengths, so that the same shapes and the same buffers come again: CUDA captures
the step once for each length and number of rows, and launches it as a whole from then on. Each row's own length lies
in the mask. A captured step reads and writes the very addresses that it was captured with, so the buffers of a
decoding that has ended are kept for the next one.

Unverified on a GPU: seen to be accepted by onnxruntime-gpu 1.31.1 without one, and tested on the CPU's memory.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .config import GPT2Config
from .decoder import CHUNK_TOKENS, Decoder, pieces
from .errors import MachineError, RequestError
from .package import (
    ATTENTION_MASK,
    CACHE_KINDS,
    INPUT_IDS,
    LOGITS,
    NEXT_IDS,
    NUM_LOGITS_TO_KEEP,
    POSITION_IDS,
    TOP_IDS,
    TOP_LOGITS,
    past_name,
    present_name,
)
from .session import load_onnxruntime

if TYPE_CHECKING:
    import onnxruntime

SHORTEST = 128
"""Tokens of the shortest mask of a step; each longer one is twice as long. Attention reads by a row's own length, so a
mask that is too long costs little, and each length costs one capture."""

NO_CAPTURE = -1
"""The id of a run that is neither captured nor launched from a capture."""

COPY = bytes.fromhex(
    "08083a390a100a017812017922084964656e746974791201635a100a0178120b0a09080a12050a0312016e62100a0179120b0a09080a12050a"
    "0312016e42040a00100d"
)
"""An ONNX model: x [n] float16 -> y = x, with which a row is copied on the device."""


@dataclass(slots=True)
class _Step:
    """A step of some rows at one mask length, bound once."""

    binding: Any
    inputs: dict[str, Any]  # OrtValues on the device
    logits: Any  # [n, 1, V] float32
    next_ids: Any  # [n, 1] int64
    graph_id: int


@dataclass(slots=True)
class _Buffers:
    """Keys and values of B rows of M tokens on the device, and the steps that were captured with them."""

    batch: int
    capacity: int
    values: list[Any]  # OrtValues [B, H, M, D] float16, keys and values of each layer in turn
    steps: dict[tuple[int, int], _Step] = field(default_factory=dict)  # by number of rows and mask length


class DeviceDecoder(Decoder):
    """A decoder whose cache lies on the device of its session."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        config: GPT2Config,
        *,
        top_k: onnxruntime.InferenceSession | None = None,
        device: str = "cuda",
        index: int = 0,
        captures: bool = True,
    ) -> None:
        """`top_k` is a session of the package's TOP_K_MODEL there; `captures` says that `session` may capture."""
        super().__init__(session, config, kv_cache="float16")
        self.top_k, self.device, self.index, self.captures = top_k, device, index, captures
        self.graph_ids = itertools.count(1)
        self._copier: onnxruntime.InferenceSession | None = None
        self._idle: list[_Buffers] = []
        self._lock = threading.Lock()

    def start(self, *, batch: int, capacity: int) -> DeviceDecoding:  # type: ignore[override]
        """As `Decoder.start`; the buffers are those of a decoding that has ended, where some fit."""
        cache = DeviceCache(self, self.borrow(batch, self.mask_length(capacity)))
        return DeviceDecoding(self, cache)

    def mask_length(self, tokens: int) -> int:
        """The shortest of the lengths that hold so many tokens."""
        length = SHORTEST
        while length < tokens:
            length *= 2
        return min(length, self.config.n_ctx)

    def borrow(self, batch: int, capacity: int) -> _Buffers:
        """Buffers that nobody uses.

        Raises:
            RequestError: no rows.
            MachineError: the device's memory does not suffice.
        """
        if batch < 1:
            raise RequestError(f"a cache of {batch} rows, expected 1 or more")
        with self._lock:
            for place, idle in enumerate(self._idle):
                if (idle.batch, idle.capacity) == (batch, capacity):
                    return self._idle.pop(place)
        shape = batch, self.config.n_head, capacity, self.config.head_dim
        try:
            values = [self.on_device(np.zeros(shape, np.float16)) for _ in range(2 * self.config.n_layer)]
        except Exception as error:
            reason = " ".join(str(error).split())
            raise MachineError(
                f"no memory on {self.device} for {batch} rows of {capacity} tokens ({reason}); ask for fewer samples "
                "at once, or fewer tokens"
            ) from error
        return _Buffers(batch, capacity, values)

    def give_back(self, buffers: _Buffers) -> None:
        with self._lock:
            self._idle.append(buffers)

    def on_device(self, array: NDArray[Any]) -> Any:
        """A copy of an array in the device's memory."""
        array = np.array(array, order="C")  # on the CPU the memory would be shared
        return load_onnxruntime().OrtValue.ortvalue_from_numpy(array, self.device, self.index)

    def run(self, session: onnxruntime.InferenceSession, binding: Any, *, graph_id: int = NO_CAPTURE) -> None:
        """Run what is bound.

        Raises:
            MachineError: the device failed.
        """
        options = load_onnxruntime().RunOptions()
        if self.captures:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        try:
            session.run_with_iobinding(binding, options)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise MachineError(
                f"{self.device} failed to run the model ({reason}); free memory and run again"
            ) from error

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy float16 numbers between addresses on the device."""
        if self._copier is None:
            provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[self.device]
            options = {"device_id": str(self.index)} if self.index else {}
            self._copier = load_onnxruntime().InferenceSession(COPY, providers=[(provider, options)])
        binding = self._copier.io_binding()
        binding.bind_input("x", self.device, self.index, np.float16, [count], source)
        binding.bind_output("y", self.device, self.index, np.float16, [count], target)
        self._copier.run_with_iobinding(binding)


class DeviceCache:
    """Keys and values on a device, with the interface of `kv_cache.KVCache`. Memory without a token is never read."""

    def __init__(self, decoder: DeviceDecoder, buffers: _Buffers) -> None:
        self._decoder = decoder
        self.buffers = buffers
        self.batch = buffers.batch
        self.lengths = np.zeros(buffers.batch, np.int64)
        self._returned = weakref.finalize(self, decoder.give_back, buffers)

    @property
    def capacity(self) -> int:
        """M: tokens that a row has room for."""
        return self.buffers.capacity

    def reserve(self, tokens: int) -> bool:
        """Make room for rows of `tokens` tokens; True if the buffers moved. Errors as `DeviceDecoder.borrow`."""
        if tokens <= self.capacity:
            return False
        decoder, old = self._decoder, self.buffers
        grown = decoder.borrow(self.batch, decoder.mask_length(tokens))
        used = int(self.lengths.max()) * decoder.config.head_dim
        for source, target in zip(old.values, grown.values, strict=True):
            for head in range(self.batch * decoder.config.n_head if used else 0):
                decoder.copy(
                    source.data_ptr() + self._head_bytes(old.capacity) * head,
                    target.data_ptr() + self._head_bytes(grown.capacity) * head,
                    used,
                )
        self._returned()
        self.buffers = grown
        self._returned = weakref.finalize(self, decoder.give_back, grown)
        return True

    def copy_row(self, source: int, target: int, *, tokens: int | None = None) -> None:
        """Make a row equal to another one, or to the first `tokens` tokens of it."""
        length = int(self.lengths[source]) if tokens is None else tokens
        assert length <= self.lengths[source], "the source holds fewer tokens than are to be copied"
        row_bytes = self.row_bytes()
        for buffer in self.buffers.values:
            start = buffer.data_ptr()
            self._decoder.copy(start + row_bytes * source, start + row_bytes * target, row_bytes // 2)
        self.lengths[target] = length

    def repeat_row(self, rows: slice) -> None:
        """Copy the first of these rows into the others."""
        for row in range(rows.start + 1, rows.stop):
            self.copy_row(rows.start, row)

    def row_bytes(self) -> int:
        return self._decoder.config.n_head * self._head_bytes(self.capacity)

    def _head_bytes(self, capacity: int) -> int:
        return 2 * capacity * self._decoder.config.head_dim


class DeviceDecoding:
    """Rows under way on a device, with the interface of `decoder.Decoding`."""

    def __init__(self, decoder: DeviceDecoder, cache: DeviceCache) -> None:
        self._decoder = decoder
        self.cache = cache

    def prefill(self, row: int, ids: NDArray[np.int64], *, chunk_tokens: int = CHUNK_TOKENS) -> NDArray[np.float32]:
        """As `Decoding.prefill`."""
        for last in self.append(row, ids, chunk_tokens=chunk_tokens, last_only=True):
            logits: NDArray[np.float32] = last[-1]
        return logits

    def append(
        self, row: int, ids: NDArray[np.int64], *, chunk_tokens: int = CHUNK_TOKENS, last_only: bool = False
    ) -> Iterator[NDArray[np.float32]]:
        """As `Decoding.append`."""
        if not 0 <= row < self.cache.batch:
            raise RequestError(f"no row {row}, expected 0 to {self.cache.batch - 1}")
        past = int(self.cache.lengths[row])
        self._decoder.check_ids(ids, past=past)
        self.cache.reserve(past + len(ids))
        for piece in pieces(len(ids), chunk_tokens):
            n_new = piece.stop - piece.start
            end = int(self.cache.lengths[row]) + n_new
            step = self._bind(slice(row, row + 1), n_new, mask_length=end, keep=1 if last_only else n_new)
            self._feed(step, ids[None, piece], slice(row, row + 1), mask_length=end)
            self._decoder.run(self._decoder.session, step.binding)
            self.cache.lengths[row] = end
            yield step.logits.numpy()[0]

    def decode_step(self, ids: NDArray[np.int64], *, wanted: int | None = None) -> NDArray[np.float32]:
        """Append one id to each of the first rows, each at its own length.

        Args:
            ids: [n] int64, 1 <= n <= B.
            wanted: how many of the largest logits of a row matter; None for all.
        Returns:
            Logits [n, V] float32. Those that do not matter may be -inf; one that matters alone may be 0 instead.
        Raises:
            RequestError: more ids than rows, an id out of range, or a row would outgrow the context.
        """
        n_rows = len(ids)
        if not 1 <= n_rows <= self.cache.batch:
            raise RequestError(f"{n_rows} ids for {self.cache.batch} rows, expected at most one for each")
        longest = int(self.cache.lengths[:n_rows].max())
        for row_ids in ids[:, None]:
            self._decoder.check_ids(row_ids, past=longest)
        self.cache.reserve(longest + 1)
        mask_length = self._decoder.mask_length(longest + 1)
        step = self.cache.buffers.steps.get((n_rows, mask_length))
        if step is None:
            step = self._bind(slice(0, n_rows), 1, mask_length=mask_length, keep=1)
            self.cache.buffers.steps[n_rows, mask_length] = step
        self._feed(step, ids[:, None], slice(0, n_rows), mask_length=mask_length)
        self._decoder.run(self._decoder.session, step.binding, graph_id=step.graph_id)
        self.cache.lengths[:n_rows] += 1
        return self._wanted(step, wanted)

    def reserve(self, tokens: int) -> None:
        """Make room for rows of `tokens` tokens; errors as `DeviceDecoder.borrow`."""
        self.cache.reserve(tokens)

    def _bind(self, rows: slice, n_new: int, *, mask_length: int, keep: int) -> _Step:
        """Inputs and outputs of a run, on the device but for the number of logits, which is read on the host."""
        decoder, config, n_rows = self._decoder, self._decoder.config, rows.stop - rows.start
        binding = decoder.session.io_binding()
        shapes = {INPUT_IDS: (n_rows, n_new), POSITION_IDS: (n_rows, n_new), ATTENTION_MASK: (n_rows, mask_length)}
        inputs = {name: decoder.on_device(np.zeros(shape, np.int64)) for name, shape in shapes.items()}
        inputs[NUM_LOGITS_TO_KEEP] = load_onnxruntime().OrtValue.ortvalue_from_numpy(np.array([keep], np.int64))
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        logits = decoder.on_device(np.zeros((n_rows, keep, config.n_vocab), np.float32))
        next_ids = decoder.on_device(np.zeros((n_rows, keep), np.int64))
        binding.bind_ortvalue_output(LOGITS, logits)
        binding.bind_ortvalue_output(NEXT_IDS, next_ids)
        shape = [n_rows, config.n_head, self.cache.capacity, config.head_dim]
        for index, value in enumerate(self.cache.buffers.values):
            layer, kind = divmod(index, len(CACHE_KINDS))
            start = value.data_ptr() + self.cache.row_bytes() * rows.start
            for name, bind in (
                (past_name(layer, CACHE_KINDS[kind]), binding.bind_input),
                (present_name(layer, CACHE_KINDS[kind]), binding.bind_output),
            ):
                bind(name, decoder.device, decoder.index, np.float16, shape, start)
        return _Step(binding, inputs, logits, next_ids, next(decoder.graph_ids))

    def _feed(self, step: _Step, ids: NDArray[np.int64], rows: slice, *, mask_length: int) -> None:
        """Write ids [n, S], their positions and the mask [n, mask_length] where the run reads them."""
        lengths, n_new = self.cache.lengths[rows, None], ids.shape[1]  # [n, 1]
        step.inputs[INPUT_IDS].update_inplace(np.array(ids, np.int64, order="C"))
        step.inputs[POSITION_IDS].update_inplace(lengths + np.arange(n_new))
        mask = np.arange(mask_length) < lengths + n_new
        step.inputs[ATTENTION_MASK].update_inplace(mask.astype(np.int64))

    def _wanted(self, step: _Step, wanted: int | None) -> NDArray[np.float32]:
        """Fetch what matters of a step's logits."""
        if wanted == 1:
            ids = step.next_ids.numpy()  # [n, 1]
            logits = np.full((len(ids), self._decoder.config.n_vocab), -np.inf, np.float32)
            np.put_along_axis(logits, ids, 0, axis=1)
            return logits
        if wanted is not None and self._decoder.top_k is not None:
            picked = self._picked(step, wanted)
            if picked is not None:
                return picked
        everything: NDArray[np.float32] = step.logits.numpy()[:, 0]
        return everything

    def _picked(self, step: _Step, wanted: int) -> NDArray[np.float32] | None:
        """Logits [n, V] of which the largest were picked on the device; None where they do not hold all that matter.

        Where the last one that matters equals the last one picked, others that equal it may not have been.
        """
        decoder, session = self._decoder, self._decoder.top_k
        assert session is not None, "the caller looked"
        binding = session.io_binding()
        binding.bind_ortvalue_input(LOGITS, step.logits)
        for name in (TOP_LOGITS, TOP_IDS):
            binding.bind_output(name)  # to the CPU
        session.run_with_iobinding(binding)
        values, ids = binding.copy_outputs_to_cpu()  # [n, K] each, the largest first
        n_picked = values.shape[1]
        if wanted > n_picked or (n_picked < decoder.config.n_vocab and (values[:, wanted - 1] <= values[:, -1]).any()):
            return None
        logits = np.full((len(ids), decoder.config.n_vocab), -np.inf, np.float32)
        np.put_along_axis(logits, ids, values, axis=1)
        return logits
