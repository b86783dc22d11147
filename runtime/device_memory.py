"""Keys and values in a device's memory: allocated there, copied there, and kept for whoever comes next."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from .config import GPT2Config
from .errors import MachineError, RequestError
from .kv_cache import Buffer
from .wheel import load_onnxruntime

if TYPE_CHECKING:
    import onnxruntime

SHORTEST = 128
"""Tokens of the shortest mask of a step; each longer one is twice as long. Attention reads by a row's own length, so a
mask that is too long costs little, and each length costs one capture."""

ONE_THREAD = threading.RLock()
"""Held by whoever has a GPU do something. While one thread captures a step, all that another asks of CUDA fails, and
the capture with it (seen: CUDA errors 901 and 700); other libraries of the process must keep away likewise. Not held
while a decoder's memory is freed, by whichever thread drops it last: keep it until no other captures."""

Returned = TypeVar("Returned")
Parameters = ParamSpec("Parameters")


def alone(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Hold ONE_THREAD while it runs."""

    @wraps(function)
    def holding(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        with ONE_THREAD:
            return function(*args, **kwargs)

    return holding


COPY = bytes.fromhex(
    "08083a390a100a017812017922084964656e746974791201635a100a0178120b0a09080a12050a0312016e62100a0179120b0a09080a12050a"
    "0312016e42040a00100d"
)
"""An ONNX model: x [n] float16 -> y = x, with which a row is copied on the device."""


@dataclass(slots=True)
class Buffers:
    """Keys and values of B rows of M tokens on the device, and the steps that were captured with them."""

    batch: int
    capacity: int
    values: list[Any]  # OrtValues [B, H, M, D] float16, keys and values of each layer in turn
    steps: dict[tuple[int, int], Any] = field(default_factory=dict)  # by number of rows and mask length
    piece: Any = None  # the last piece of a prompt, whose memory is freed where ONE_THREAD is held


class DeviceMemory:
    """Memory of one device: for arrays, and for the caches of one model. Whoever calls holds ONE_THREAD."""

    def __init__(self, config: GPT2Config, *, device: str, index: int) -> None:
        self.config, self.device, self.index = config, device, index
        self._copier: onnxruntime.InferenceSession | None = None
        self._idle: list[Buffers] = []

    def on_device(self, array: NDArray[Any]) -> Any:
        """A copy of an array in the device's memory."""
        array = np.array(array, order="C")  # on the CPU the memory would be shared
        return load_onnxruntime().OrtValue.ortvalue_from_numpy(array, self.device, self.index)

    def mask_length(self, tokens: int) -> int:
        """The shortest of the lengths that hold so many tokens."""
        length = SHORTEST
        while length < tokens:
            length *= 2
        return min(length, self.config.n_ctx)

    def borrow(self, batch: int, capacity: int) -> Buffers:
        """Buffers that nobody uses.

        Raises:
            RequestError: no rows.
            MachineError: the device's memory does not suffice.
        """
        if batch < 1:
            raise RequestError(f"a cache of {batch} rows, expected 1 or more")
        for place, idle in enumerate(self._idle):
            if (idle.batch, idle.capacity) == (batch, capacity):
                return self._idle.pop(place)
        shape = batch, self.config.n_head, capacity, self.config.head_dim
        while True:
            try:
                return Buffers(batch, capacity, self._zeros(shape))
            except Exception as error:
                if not self._idle:
                    reason = " ".join(str(error).split())
                    raise MachineError(
                        f"no memory on {self.device} for {batch} rows of {capacity} tokens ({reason}); ask for fewer "
                        "samples at once, or fewer tokens"
                    ) from error
            self._idle.clear()  # behind the error, which held what was allocated of the new ones

    def _zeros(self, shape: tuple[int, ...]) -> list[Any]:
        return [self.on_device(np.zeros(shape, np.float16)) for _ in range(2 * self.config.n_layer)]

    def give_back(self, buffers: Buffers) -> None:
        """Keep buffers for the next one. Any thread may call it at any time, as the garbage collector does."""
        self._idle.append(buffers)

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

    @alone
    def __init__(self, memory: DeviceMemory, *, batch: int, capacity: int) -> None:
        """Room for `capacity` tokens in each of `batch` rows; errors as `DeviceMemory.borrow`."""
        self._memory = memory
        self.batch = batch
        self.lengths = np.zeros(batch, np.int64)
        self._take(memory.borrow(batch, memory.mask_length(capacity)))

    @property
    def capacity(self) -> int:
        """M: tokens that a row has room for."""
        return self.buffers.capacity

    @alone
    def reserve(self, tokens: int) -> bool:
        """Make room for rows of `tokens` tokens; True if the buffers moved. Errors as `DeviceMemory.borrow`."""
        if tokens <= self.capacity:
            return False
        memory, old = self._memory, self.buffers
        grown = memory.borrow(self.batch, memory.mask_length(tokens))
        used = int(self.lengths.max()) * memory.config.head_dim
        for source, target in zip(old.values, grown.values, strict=True):
            for head in range(self.batch * memory.config.n_head if used else 0):
                memory.copy(
                    source.data_ptr() + self._head_bytes(old.capacity) * head,
                    target.data_ptr() + self._head_bytes(grown.capacity) * head,
                    used,
                )
        self._returned()
        self._take(grown)
        return True

    @alone
    def copy_row(self, source: int, target: int, *, tokens: int | None = None) -> None:
        """Make a row equal to another one, or to the first `tokens` tokens of it."""
        length = int(self.lengths[source]) if tokens is None else tokens
        assert length <= self.lengths[source], "the source holds fewer tokens than are to be copied"
        row_bytes = self.row_bytes()
        for buffer in self.buffers.values:
            start = buffer.data_ptr()
            self._memory.copy(start + row_bytes * source, start + row_bytes * target, row_bytes // 2)
        self.lengths[target] = length

    @alone
    def row(self, row: int) -> Buffer:
        """What a row holds: [buffers, H, P, D] float16, a copy on the host."""
        return np.stack([value.numpy()[row, :, : self.lengths[row]] for value in self.buffers.values])

    @alone
    def extend(self, row: int, tokens: Buffer) -> None:
        """As `KVCache.extend`. Whole buffers travel there and back: for what happens once, not at every token."""
        start = int(self.lengths[row])
        end = start + tokens.shape[2]
        assert end <= self.capacity, "whoever runs the graph makes room first"
        for value, new in zip(self.buffers.values, tokens, strict=True):
            array = np.array(value.numpy())
            array[row, :, start:end] = new
            value.update_inplace(array)
        self.lengths[row] = end

    def truncate(self, row: int, length: int) -> None:
        """Forget what a row holds beyond its first `length` tokens."""
        assert 0 <= length <= self.lengths[row], "a row cannot be cut to more than it holds"
        self.lengths[row] = length

    def row_bytes(self) -> int:
        return self._memory.config.n_head * self._head_bytes(self.capacity)

    def _take(self, buffers: Buffers) -> None:
        self.buffers = buffers
        self._returned = weakref.finalize(self, self._memory.give_back, buffers)

    def _head_bytes(self, capacity: int) -> int:
        return 2 * capacity * self._memory.config.head_dim
