"""Memory comes back when its last part is done with, and only then."""

from __future__ import annotations

import numpy as np

from runtime.cache_memory import CacheMemory


def address(array: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> int:
    return int(array.ctypes.data)


def test_what_came_back_is_lent_again() -> None:
    memory = CacheMemory(most_bytes=4096)
    first = memory.lend(1000, np.float32)
    first[:] = 7
    where = address(first)
    del first
    second = memory.lend(500, np.float32)
    assert address(second) == where and (second == 7).all()


def test_a_part_of_it_holds_all_of_it() -> None:
    memory = CacheMemory(most_bytes=4096)
    buffers = list(memory.lend(1000, np.float32).reshape(10, 100))
    part = buffers[3][10:20]
    del buffers
    other = memory.lend(1000, np.float32)
    assert not np.shares_memory(part, other)


def test_fresh_memory_is_zero() -> None:
    assert not CacheMemory(0).lend(1000, np.int8).any()


def test_a_larger_block_than_may_be_kept_goes_back() -> None:
    memory = CacheMemory(most_bytes=3999)
    memory.lend(1000, np.float32)[:] = 7
    assert not memory.lend(1000, np.float32).any()


def test_spare_items_serve_a_larger_one_later() -> None:
    memory = CacheMemory(most_bytes=8000)
    memory.lend(1000, np.float32, spare_items=1000)[:] = 7
    later = memory.lend(2000, np.float32)
    assert (later[:1000] == 7).all() and not later[1000:].any()


def test_a_block_that_is_too_small_is_let_go() -> None:
    memory = CacheMemory(most_bytes=8000)
    memory.lend(10, np.float32)[:] = 7
    large = memory.lend(2000, np.float32)
    assert not large.any() and not memory.lend(10, np.float32).any()
