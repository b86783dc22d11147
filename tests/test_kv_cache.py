"""The cache: as large as it was asked to be, in one piece per row, and never larger than the context."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest

from runtime.config import OFFICIAL_SIZES
from runtime.errors import MachineError, RequestError
from runtime.kv_cache import KVCache
from runtime.package import past_name, present_name

from .tiny import tiny_config

CONFIG = tiny_config()


def total_bytes(cache: KVCache) -> int:
    return sum(buffer.nbytes for _, _, buffer in cache.bindings(slice(0, cache.batch)))


def fill(cache: KVCache, value: float = 1.0) -> None:
    for _, _, buffer in cache.bindings(slice(0, cache.batch)):
        buffer[...] = value


@pytest.mark.parametrize("batch", [1, 3])
def test_a_cache_holds_what_was_asked_for_and_no_more(batch: int) -> None:
    cache = KVCache(CONFIG, batch=batch, capacity=10)
    assert (cache.batch, cache.capacity) == (batch, 10)
    assert total_bytes(cache) == batch * 10 * CONFIG.cache_items_per_token * 4


def test_buffers_are_named_as_the_graph_names_them_layer_by_layer() -> None:
    names = [names[:2] for names in KVCache(CONFIG, batch=1, capacity=4).bindings(slice(0, 1))]
    assert names == [
        (past_name(layer, kind), present_name(layer, kind))
        for layer in range(CONFIG.n_layer)
        for kind in ("key", "value")
    ]


def test_a_row_is_one_contiguous_piece_of_the_buffer_itself() -> None:
    cache = KVCache(CONFIG, batch=3, capacity=4)
    whole = [buffer for _, _, buffer in cache.bindings(slice(0, 3))]
    for buffer, (_, _, row) in zip(whole, cache.bindings(slice(1, 2)), strict=True):
        assert row.shape == (1, CONFIG.n_head, 4, CONFIG.head_dim)
        assert row.flags.c_contiguous
        assert np.shares_memory(row, buffer)


def test_reserve_within_the_capacity_moves_nothing() -> None:
    cache = KVCache(CONFIG, batch=1, capacity=10)
    assert not cache.reserve(10)
    assert cache.capacity == 10


def test_growth_is_by_half_so_that_appending_stays_linear() -> None:
    cache = KVCache(CONFIG, batch=1, capacity=20)
    assert cache.reserve(21)
    assert cache.capacity == 30


def test_growth_goes_as_far_as_is_asked_for() -> None:
    cache = KVCache(CONFIG, batch=1, capacity=4)
    cache.reserve(40)
    assert cache.capacity == 40


def test_growth_stops_at_the_context() -> None:
    cache = KVCache(CONFIG, batch=1, capacity=CONFIG.n_ctx - 1)
    cache.reserve(CONFIG.n_ctx)
    assert cache.capacity == CONFIG.n_ctx


def test_growth_keeps_the_tokens_and_the_lengths() -> None:
    cache = KVCache(CONFIG, batch=2, capacity=4)
    cache.lengths[:] = (4, 2)
    fill(cache, 7.0)
    cache.reserve(5)
    assert cache.lengths.tolist() == [4, 2]
    assert all((buffer[:, :, :4] == 7.0).all() for _, _, buffer in cache.bindings(slice(0, 2)))


@pytest.mark.parametrize(("tokens", "copied"), [(None, 3), (2, 2)])
def test_a_row_takes_another_ones_tokens_and_length(tokens: int | None, copied: int) -> None:
    cache = KVCache(CONFIG, batch=3, capacity=4)
    for row in range(3):
        for _, _, buffer in cache.bindings(slice(row, row + 1)):
            buffer[...] = row
    cache.lengths[:] = (1, 3, 4)
    cache.copy_row(1, 2, tokens=tokens)
    assert cache.lengths.tolist() == [1, 3, copied]
    for row, held in enumerate((0, 1, 2)):
        for _, _, buffer in cache.bindings(slice(row, row + 1)):
            assert (buffer[:, :, :copied] == (1 if row == 2 else held)).all()
            assert (buffer[:, :, copied:] == held).all()


@pytest.mark.parametrize(("batch", "capacity"), [(0, 4), (-1, 4), (1, 0), (1, CONFIG.n_ctx + 1)])
def test_no_rows_or_more_than_the_context_is_refused(batch: int, capacity: int) -> None:
    with pytest.raises(
        RequestError, match=rf"cache of {batch} rows with room for {capacity} tokens each, expected .* 1 to 64 tokens"
    ):
        KVCache(CONFIG, batch=batch, capacity=capacity)


@pytest.mark.parametrize("batch", [10**6, 10**12, 10**19, 10**20])
def test_memory_that_cannot_be_had_is_the_machines_failure(batch: int) -> None:
    # a million rows of 774M: 377 TB in all
    with pytest.raises(
        MachineError, match=r"no memory for a cache of 1024 tokens x \d+ rows \([\d,]+ bytes\); ask for"
    ):
        KVCache(OFFICIAL_SIZES["774M"], batch=batch, capacity=1024)


def test_a_cache_that_cannot_grow_stays_as_it_was() -> None:
    cache = KVCache(OFFICIAL_SIZES["1558M"], batch=1000, capacity=1)  # 0.6 GB, reserved and never touched
    cache.lengths[0] = 1
    with pytest.raises(MachineError, match="no memory for a cache of 1024 tokens x 1000 rows"):
        cache.reserve(1024)
    assert cache.capacity == 1
    assert cache.lengths[0] == 1


@pytest.mark.parametrize("sources", [[0, 1, 2], [2, 0, 1], [1, 1, 1], [0, 2, 2]])
def test_rows_are_taken_from_where_they_stood(sources: list[int]) -> None:
    cache = KVCache(CONFIG, batch=3, capacity=5)
    cache.lengths[:] = (4, 2, 5)
    rng = np.random.default_rng(0)
    buffers = [buffer for _, _, buffer in cache.bindings(slice(0, 3))]
    for buffer in buffers:
        buffer[...] = rng.normal(size=buffer.shape)
    before = [buffer.copy() for buffer in buffers]
    cache.take_rows(np.array(sources))
    assert cache.lengths.tolist() == [(4, 2, 5)[source] for source in sources]
    for old, new in zip(before, buffers, strict=True):
        for row, source in enumerate(sources):
            np.testing.assert_array_equal(new[row, :, : cache.lengths[row]], old[source, :, : cache.lengths[row]])


def test_rows_that_nobody_knows_yet_take_memory_as_they_are_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before, config = resident(), OFFICIAL_SIZES["774M"]
    cache = KVCache(config, batch=8, capacity=1, unforeseen=True)
    assert cache.capacity == config.n_ctx
    assert total_bytes(cache) == 8 * config.n_ctx * config.cache_items_per_token * 4  # 3.0 GB
    for _, _, buffer in cache.bindings(slice(0, 8)):
        assert not buffer[:, :, :64].any()
        buffer[:, :, :64] = 1
    assert resident() - before < 1.1 * 8 * 64 * config.cache_items_per_token * 4  # 0.19 GB


def test_memory_beyond_the_machines_is_refused_for_them_too() -> None:
    with pytest.raises(MachineError, match="no memory for a cache of 1024 tokens x 1000000 rows"):
        KVCache(OFFICIAL_SIZES["774M"], batch=10**6, capacity=1024, unforeseen=True)
