"""What this machine can do at all: how fast it reads memory, and how fast it multiplies. numpy, no compiler."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

LARGEST_READ_BYTES = 512 << 20
"""No processor's caches hold this much: to read more tells nothing new."""

SMALLEST_PASS_BYTES = 64 << 20
"""A thread reads a small buffer again and again up to this much in one pass, so that starting it does not count."""

PASSES = 7
PRODUCT_SIZE = 768


def read_gb_per_s(working_set_bytes: int, *, threads: int, available_bytes: int | None = None) -> float:
    """How fast so many threads read so much memory, in 1e9 bytes a second: the best of several passes.

    Each thread reads a part of its own. A set that fits the processor's caches is read from there, as the weights of a
    small model are.

    Args:
        working_set_bytes: what one pass reads; cut to LARGEST_READ_BYTES, and to a quarter of `available_bytes`.
        threads: numpy's reductions let go of the interpreter, so they run side by side.
        available_bytes: memory that may be taken; None: as much as is needed.
    """
    size = min(working_set_bytes, LARGEST_READ_BYTES, (available_bytes or 1 << 62) // 4)
    words = max(1, size // threads // 8)
    parts = [np.ones(words, np.uint64) for _ in range(threads)]
    repeats = max(1, SMALLEST_PASS_BYTES // (words * 8))

    def read(part: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        for _ in range(repeats):
            np.bitwise_or.reduce(part)

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PASSES):
            started = time.perf_counter()
            list(pool.map(read, parts))
            best = min(best, time.perf_counter() - started)
    return threads * words * 8 * repeats / best / 1e9


def multiply_gflops() -> float:
    """float32 matrix products by numpy's BLAS with its own threads, in 1e9 operations a second: the best of several."""
    matrix = np.ones((PRODUCT_SIZE, PRODUCT_SIZE), np.float32)
    best = float("inf")
    for _ in range(PASSES):
        started = time.perf_counter()
        np.matmul(matrix, matrix)
        best = min(best, time.perf_counter() - started)
    return 2 * PRODUCT_SIZE**3 / best / 1e9
