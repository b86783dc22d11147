"""PrefixCache: less is run, no bit changes, and the memory stays within its bound."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.decoder import Decoder, Decoding
from runtime.errors import RequestError
from runtime.package import open_package
from runtime.prefix_cache import BLOCK_TOKENS, PrefixCache, prefill
from runtime.text_generator import open_decoder

Ids = NDArray[np.int64]

RNG = np.random.default_rng(11)
SYSTEM = RNG.integers(0, 8191, 150)
PLENTY = 1 << 26


@pytest.fixture(scope="module")
def fp32(demo_fp32: Path) -> Decoder:
    return open_decoder(open_package(demo_fp32))


@pytest.fixture(scope="module")
def int8(demo_int8: Path) -> Decoder:
    return open_decoder(open_package(demo_int8))


@pytest.fixture(scope="module")
def int8_cache(demo_int8_kv8: Path) -> Decoder:
    return open_decoder(open_package(demo_int8_kv8))


@pytest.fixture(scope="module", params=["fp32", "int8", "int8_cache"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    chosen: Decoder = request.getfixturevalue(request.param)
    return chosen


@pytest.fixture(scope="module")
def tiny(tiny_fp32: Path) -> Decoder:
    return open_decoder(open_package(tiny_fp32))


def prefilled(cache: PrefixCache | None, decoder: Decoder, ids: Ids) -> tuple[Decoding, NDArray[np.float32]]:
    decoding = decoder.start(batch=1, capacity=len(ids))
    logits = decoding.prefill(0, ids) if cache is None else prefill(decoding, 0, ids, prefixes=cache)
    assert logits is not None
    return decoding, logits.copy()


def reused(cache: PrefixCache, decoder: Decoder, ids: Ids) -> int:
    """Tokens of a prompt that are known, as running it tells."""
    before = cache.reused_tokens
    prefilled(cache, decoder, ids)
    return cache.reused_tokens - before


def blocks(start: int, count: int) -> Ids:
    """A prompt of whole blocks, all of one id, and two tokens that are run in any case."""
    return np.array([start] * count * BLOCK_TOKENS + [0, 0])


def block_bytes(decoder: Decoder) -> int:
    return decoder.config.cache_items_per_token * BLOCK_TOKENS * np.dtype(decoder.kv_cache).itemsize


# Exactness


def test_every_beginning_gives_the_bits_of_a_run_without(decoder: Decoder) -> None:
    """Logits, keys and values, of prompts that share any number of tokens with earlier ones."""
    cache = PrefixCache(decoder, max_bytes=PLENTY)
    for shared in (150, 150, 0, 1, 2, 15, 16, 17, 18, 31, 47, 112, 126, 127, 128, 129, 144, 149):
        for tail in (1, 2, 3, 40):
            ids = np.concatenate([SYSTEM[:shared], RNG.integers(0, 8191, tail)])
            known = cache.reused_tokens
            decoding, logits = prefilled(cache, decoder, ids)
            expected, expected_logits = prefilled(None, decoder, ids)
            assert np.array_equal(logits, expected_logits), (shared, tail, cache.reused_tokens - known)
            assert np.array_equal(decoding.cache.row(0), expected.cache.row(0))
    assert cache.reused_tokens > 4000


@pytest.mark.parametrize("length", [1, 2, 16, 17, 18, 33])
def test_the_same_prompt_again_leaves_two_tokens_to_run_or_more(tiny: Decoder, length: int) -> None:
    cache, ids = PrefixCache(tiny, max_bytes=PLENTY), np.arange(length)
    assert reused(cache, tiny, ids) == 0
    assert reused(cache, tiny, ids) == max(0, length - 2) // BLOCK_TOKENS * BLOCK_TOKENS
    assert np.array_equal(prefilled(cache, tiny, ids)[1], prefilled(None, tiny, ids)[1])


def test_any_row_of_a_batch_may_be_filled(tiny: Decoder) -> None:
    cache, ids = PrefixCache(tiny, max_bytes=PLENTY), np.arange(40)
    decoding = tiny.start(batch=3, capacity=2)  # grows on the way
    logits = [np.array(prefill(decoding, row, ids[: 40 - row], prefixes=cache)) for row in (2, 0, 1)]
    assert decoding.cache.lengths.tolist() == [40, 39, 38]
    assert cache.reused_tokens == 32 + 32
    for row, got in zip((2, 0, 1), logits, strict=True):
        assert np.array_equal(got, prefilled(None, tiny, ids[: 40 - row])[1])


def test_what_a_row_becomes_later_does_not_change_what_is_kept(tiny: Decoder) -> None:
    cache, ids = PrefixCache(tiny, max_bytes=PLENTY), np.arange(40)
    decoding, _ = prefilled(cache, tiny, ids)
    for _, _, buffer in decoding.cache.bindings(slice(0, 1)):
        buffer[...] = 7
    again, _ = prefilled(cache, tiny, ids)
    assert np.array_equal(again.cache.row(0), prefilled(None, tiny, ids)[0].cache.row(0))


def test_ids_that_the_model_has_not_are_refused_and_not_kept(tiny: Decoder) -> None:
    cache = PrefixCache(tiny, max_bytes=PLENTY)
    with pytest.raises(RequestError, match="token id 999 is not in the model"):
        prefilled(cache, tiny, np.array([*range(40), 999]))
    assert cache.held_bytes == 0


# Memory


def test_a_beginning_that_prompts_share_is_kept_once(tiny: Decoder) -> None:
    cache = PrefixCache(tiny, max_bytes=PLENTY)
    for last in range(10):
        prefilled(cache, tiny, np.array([*range(32), *[last] * 16]))
    assert cache.held_bytes == (2 + 10) * block_bytes(tiny)


def test_the_bound_holds_whatever_is_run(tiny: Decoder) -> None:
    bound = 5 * block_bytes(tiny) + 1
    cache, rng, most = PrefixCache(tiny, max_bytes=bound), np.random.default_rng(1), 0
    for _ in range(200):
        ids = rng.integers(0, 2, rng.integers(1, 64)) if rng.integers(2) else np.arange(rng.integers(1, 64))
        _, logits = prefilled(cache, tiny, ids)
        held = sum(block.nbytes for block in cache._blocks.values())
        assert held == cache.held_bytes <= bound
        most = max(most, held)
        assert np.array_equal(logits, prefilled(None, tiny, ids)[1])
    assert most == 5 * block_bytes(tiny)
    assert cache.reused_tokens > 0


def test_what_was_not_used_for_the_longest_time_goes_first_and_ends_before_beginnings(tiny: Decoder) -> None:
    cache = PrefixCache(tiny, max_bytes=4 * block_bytes(tiny))
    for prompt in (blocks(1, 2), blocks(2, 2)):
        prefilled(cache, tiny, prompt)
    prefilled(cache, tiny, blocks(1, 2))  # so the other one is the older
    prefilled(cache, tiny, blocks(3, 1))
    held = set(cache._blocks)

    def known(prompt: Ids) -> int:
        """As `insert` tells, without running: that would move others out."""
        again = PrefixCache(tiny, max_bytes=PLENTY)
        again._blocks = cache._blocks.copy()
        return again.insert(tiny.start(batch=1, capacity=1), 0, prompt) // BLOCK_TOKENS

    assert [known(blocks(start, count)) for start, count in ((1, 2), (2, 2), (3, 1))] == [2, 1, 1]
    assert set(cache._blocks) == held
    prefilled(cache, tiny, blocks(4, 1))
    assert [known(blocks(start, 2)) for start in (1, 2, 3, 4)] == [2, 0, 1, 1]


def test_of_a_prompt_larger_than_the_cache_the_beginning_is_kept(tiny: Decoder) -> None:
    cache, ids = PrefixCache(tiny, max_bytes=2 * block_bytes(tiny)), np.arange(60)
    prefilled(cache, tiny, ids)
    assert reused(cache, tiny, ids) == 2 * BLOCK_TOKENS


@pytest.mark.parametrize("max_bytes", [0, -1, 8191, 1e9, True])
def test_no_room_for_a_block_is_refused(tiny: Decoder, max_bytes: int) -> None:
    assert block_bytes(tiny) == 8192
    with pytest.raises(RequestError, match=r"a prefix cache of .* bytes, expected 8,192 or more"):
        PrefixCache(tiny, max_bytes=max_bytes)


# Threads


def test_threads_that_share_a_small_cache_get_the_bits_of_a_run_without(int8: Decoder) -> None:
    bound = 12 * block_bytes(int8)
    cache = PrefixCache(int8, max_bytes=bound)
    prompts = [SYSTEM[: RNG.integers(20, 150)] if n % 2 else RNG.integers(0, 3, 70) for n in range(120)]

    def run(ids: Ids) -> bool:
        same = np.array_equal(prefilled(cache, int8, ids)[1], prefilled(None, int8, ids)[1])
        return same and cache.held_bytes <= bound

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(run, prompts))
    assert cache.reused_tokens > 0
