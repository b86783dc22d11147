"""A fingerprint of the weights themselves, taken while they stream past: the same for every layout of a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from .lazy_tensors import LazyTensors


class FingerprintedTensors(LazyTensors[NDArray[np.float32]]):
    """Passes look-ups on to `tensors`, and remembers the sha256 of what it saw."""

    def __init__(self, tensors: Mapping[str, NDArray[np.float32]], progress: Callable[[int], None]) -> None:
        """`progress` is called with the number of parameters that have passed."""
        super().__init__(tensors)
        self._tensors = tensors
        self._progress = progress
        self._digests: dict[str, bytes] = {}
        self._parameters = 0

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        array = self._tensors[name]
        if name not in self._digests:
            self._digests[name] = hashlib.sha256(array.data).digest()
            self._parameters += array.size
            self._progress(self._parameters)
        return array

    def fingerprint(self) -> str:
        """sha256 over each name and the sha256 of its float32 values, in the order of the names, in hexadecimal."""
        whole = hashlib.sha256()
        for name in sorted(self._digests):
            whole.update(name.encode() + b"\0" + self._digests[name])
        return whole.hexdigest()
