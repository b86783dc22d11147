"""The decoder on a GPU: keys and values stay there, a step is one captured launch, and only what is wanted travels.

A step runs with a mask of one of few lengths, so that the same shapes and the same buffers come again: CUDA captures
the step once for each length and number of rows, and launches it as a whole from then on. Each row's own length lies
in the mask. A captured step reads and writes the very addresses that it was captured with, so the buffers of a
decoding that has ended are kept for the next one.

One thread at a time has a GPU do something, and each has its own captures: onnxruntime keeps them by thread. That was
tested on the CPU's memory; on a GPU it was seen what happens without.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .config import GPT2Config
from .decoder import Decoder, Decoding
from .device_memory import DeviceCache, DeviceMemory, alone
from .errors import MachineError, PackageError
from .package import (
    ATTENTION_MASK,
    CACHE_KINDS,
    INPUT_IDS,
    LOGITS,
    NEXT_IDS,
    NUM_LOGITS_TO_KEEP,
    POSITION_IDS,
    TOP_IDS,
    TOP_K_MODEL,
    TOP_LOGITS,
    Package,
    past_name,
    present_name,
)
from .place import Place
from .session import Opened, open_session
from .wheel import load_onnxruntime

if TYPE_CHECKING:
    import onnxruntime

CAPTURING = {"enable_cuda_graph": "1"}
"""Provider options of a session whose runs may be captured."""

WHOLE = sys.maxsize
"""Tokens of a piece of a prompt: any. 896 tokens of 774M fp16 took 7.6 ms in one piece on an H200, 58 ms in pieces of
128: as long as 128 tokens take, once for each."""

NO_CAPTURE = -1
"""The id of a run that is neither captured nor launched from a capture."""


@dataclass(slots=True)
class _Step:
    """A step of some rows at one mask length, bound once."""

    binding: Any
    inputs: dict[str, Any]  # OrtValues on the device
    logits: Any  # [n, 1, V] float32
    next_ids: Any  # [n, 1] int64
    graph_id: int


class DeviceDecoder(Decoder):
    """A decoder whose cache lies on the device of its session."""

    chunk_tokens = WHOLE

    def __init__(
        self,
        opened: Opened,
        config: GPT2Config,
        *,
        top_k: onnxruntime.InferenceSession | None = None,
        device: str = "cuda",
        index: int = 0,
        captures: bool = True,
    ) -> None:
        """`top_k` is a session of the package's TOP_K_MODEL there; `captures` says that `opened` may capture."""
        super().__init__(opened, config, kv_cache="float16")
        self.top_k, self.captures = top_k, captures
        self.memory = DeviceMemory(config, device=device, index=index)
        self.graph_ids = itertools.count(1)

    @classmethod
    @alone
    def of_package(cls, package: Package, place: Place, *, threads: int | None = None) -> DeviceDecoder:
        """Open a package for CUDA; errors as `session.open_session`."""
        try:
            opened = open_session(package.model_path, place=place, threads=threads, provider_settings=CAPTURING)
        except PackageError:
            open_session(package.model_path, place=place, threads=threads)  # without capture the nodes are named
            raise
        top_k = open_session(package.folder / TOP_K_MODEL, place=place, threads=threads)
        return cls(opened, package.manifest.config, top_k=top_k.session, device=place.device, index=place.index)

    @property
    def attention_rows(self) -> int:
        """Tokens that attention takes at a time: all, so that no prompt is cut for it."""
        return WHOLE

    def start(self, *, batch: int, capacity: int, unforeseen: bool = False) -> DeviceDecoding:
        """As `Decoder.start`; the buffers are those of a decoding that has ended, where some fit, and grow."""
        cache = DeviceCache(self.memory, batch=batch, capacity=capacity)
        return DeviceDecoding(self, cache)  # type: ignore[arg-type]

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
                f"{self.memory.device} failed to run the model ({reason}); free memory and run again"
            ) from error


class DeviceDecoding(Decoding):
    """Rows under way on a device. What a step does not want of its logits is left there: see `_wanted`."""

    _decoder: DeviceDecoder
    cache: DeviceCache  # type: ignore[assignment]

    def reserve(self, tokens: int) -> None:
        """Make room for rows of `tokens` tokens; errors as `DeviceMemory.borrow`."""
        self.cache.reserve(tokens)

    @alone
    def _run_piece(self, row: int, ids: NDArray[np.int64], *, keep: int, ends_long: bool) -> NDArray[np.float32]:
        rows, n_new = slice(row, row + 1), ids.shape[1]
        end = int(self.cache.lengths[row]) + n_new
        step = self.cache.buffers.piece = self._bind(rows, n_new, mask_length=end, keep=keep)
        self._feed(step, ids, rows, mask_length=end)
        self._decoder.run(self._decoder.session, step.binding)
        self.cache.lengths[row] = end
        logits: NDArray[np.float32] = step.logits.numpy()[0]
        return logits

    @alone
    def _run_step(self, ids: NDArray[np.int64], wanted: int | None) -> NDArray[np.float32]:
        """As `Decoding._run_step`; logits that do not matter may be -inf, one that matters alone may be 0 instead."""
        n_rows = len(ids)
        mask_length = self._decoder.memory.mask_length(int(self.cache.lengths[:n_rows].max()) + 1)
        step = self.cache.buffers.steps.get((n_rows, mask_length))
        if step is None:
            step = self._bind(slice(0, n_rows), 1, mask_length=mask_length, keep=1)
            self.cache.buffers.steps[n_rows, mask_length] = step
        self._feed(step, ids, slice(0, n_rows), mask_length=mask_length)
        self._decoder.run(self._decoder.session, step.binding, graph_id=step.graph_id)
        self.cache.lengths[:n_rows] += 1
        return self._wanted(step, wanted)

    def _bind(self, rows: slice, n_new: int, *, mask_length: int, keep: int) -> _Step:
        """Inputs and outputs of a run, on the device but for the number of logits, which is read on the host."""
        decoder, config, n_rows = self._decoder, self._decoder.config, rows.stop - rows.start
        binding = decoder.session.io_binding()
        shapes = {INPUT_IDS: (n_rows, n_new), POSITION_IDS: (n_rows, n_new), ATTENTION_MASK: (n_rows, mask_length)}
        inputs = {name: decoder.memory.on_device(np.zeros(shape, np.int64)) for name, shape in shapes.items()}
        inputs[NUM_LOGITS_TO_KEEP] = load_onnxruntime().OrtValue.ortvalue_from_numpy(np.array([keep], np.int64))
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        logits = decoder.memory.on_device(np.zeros((n_rows, keep, config.n_vocab), np.float32))
        next_ids = decoder.memory.on_device(np.zeros((n_rows, keep), np.int64))
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
                bind(name, decoder.memory.device, decoder.memory.index, np.float16, shape, start)
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
