"""The decoder: whatever the way a sequence is run, the model is the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.checkpoint import read_checkpoint
from export.reference import reference_logits
from runtime.decoder import CHUNK_TOKENS, Decoder, Decoding, pieces
from runtime.errors import RequestError
from runtime.package import open_package
from runtime.text_generator import open_decoder

from .conftest import DEMO_CHECKPOINT

Logits = NDArray[np.float32]

TOKEN_BY_TOKEN = {"fp32": 5e-5, "int8": 1.0}
"""Measured at every split: fp32 2.5e-5; int8 0.22, where one rounding turns another. The logits' deviation is 2.0."""
RAGGED_STEP = 2e-6
"""Measured: 0.0."""
LAST_ONLY = 5e-5
"""The head's product for one row against that for many. Measured at every length: 0.0."""
ORACLE_FP32 = 1e-4
"""Measured: 1.9e-5."""

SEQUENCE = np.random.default_rng(7).integers(0, 8191, 60)
"""Ids without sense: harder on a model than text."""


@pytest.fixture(scope="module")
def fp32(demo_fp32: Path) -> Decoder:
    return open_decoder(open_package(demo_fp32))


@pytest.fixture(scope="module")
def int8(demo_int8: Path) -> Decoder:
    return open_decoder(open_package(demo_int8))


@pytest.fixture(scope="module", params=["fp32", "int8"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    chosen: Decoder = request.getfixturevalue(request.param)
    return chosen


def precision_of(decoder: Decoder, fp32: Decoder) -> str:
    return "fp32" if decoder is fp32 else "int8"


def one_pass(decoder: Decoder, ids: NDArray[np.int64]) -> Logits:
    return np.concatenate([piece.copy() for piece in decoder.logits(ids, chunk_tokens=len(ids))])


def in_parts(decoder: Decoder, ids: NDArray[np.int64], lengths: Sequence[int]) -> Logits:
    decoding = decoder.start(batch=1, capacity=len(ids))
    return np.concatenate(list(appended(decoding, ids, lengths)))


def appended(decoding: Decoding, ids: NDArray[np.int64], lengths: Sequence[int]) -> Iterator[Logits]:
    for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        for logits in decoding.append(0, ids[start : start + length], chunk_tokens=length):
            yield logits.copy()


def step_by_step(decoding: Decoding, ids: NDArray[np.int64]) -> Logits:
    """One row's ids, each in a decode step of its own."""
    return np.concatenate([decoding.decode_step(ids[place : place + 1]).copy() for place in range(len(ids))])


def addresses(decoding: Decoding) -> list[int]:
    batch = decoding.cache.batch
    return [buffer.ctypes.data for _, _, buffer in decoding.cache.bindings(slice(0, batch))]


# Against the oracle


def test_the_fp32_logits_are_the_oracles(fp32: Decoder) -> None:
    checkpoint = read_checkpoint(DEMO_CHECKPOINT)
    (expected,) = reference_logits(checkpoint.config, checkpoint.tensors, [SEQUENCE])
    assert np.abs(one_pass(fp32, SEQUENCE) - expected).max() < ORACLE_FP32


# Splits


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=8))
@example([2, 7, *[20] * 6])  # 129
def test_pieces_of_two_tokens_or_more_give_the_same_bits_at_fp32(fp32: Decoder, lengths: list[int]) -> None:
    ids = np.resize(SEQUENCE, sum(lengths))
    assert np.array_equal(in_parts(fp32, ids, lengths), one_pass(fp32, ids))


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=8))
def test_pieces_of_two_tokens_or_more_give_the_same_bits_at_int8(int8: Decoder, lengths: list[int]) -> None:
    ids = np.resize(SEQUENCE, sum(lengths))
    assert np.array_equal(in_parts(int8, ids, lengths), one_pass(int8, ids))


@pytest.mark.parametrize("length", [129, 130, 193, 257])
def test_a_long_run_gives_the_same_bits_as_short_pieces(decoder: Decoder, length: int) -> None:
    ids = np.resize(SEQUENCE, length)
    assert np.array_equal(one_pass(decoder, ids), in_parts(decoder, ids, [50] * (length // 50) + [length % 50]))


def test_a_full_context_in_chunks_gives_the_same_bits_as_in_one_run(decoder: Decoder) -> None:
    ids = np.resize(SEQUENCE, decoder.config.n_ctx)
    chunked = np.concatenate([piece.copy() for piece in decoder.logits(ids)])
    assert np.array_equal(chunked, one_pass(decoder, ids))


@pytest.mark.parametrize("split", [1, 2, 3, 17, 31, 58, 59])
def test_prefill_then_decode_is_one_pass_at_every_split(decoder: Decoder, fp32: Decoder, split: int) -> None:
    expected = one_pass(decoder, SEQUENCE)
    decoding = decoder.start(batch=1, capacity=len(SEQUENCE))
    prefilled = decoding.prefill(0, SEQUENCE[:split]).copy()
    stepped = step_by_step(decoding, SEQUENCE[split:])
    difference = np.abs(np.concatenate([prefilled[None], stepped]) - expected[split - 1 :]).max()
    assert difference < TOKEN_BY_TOKEN[precision_of(decoder, fp32)]


def test_token_by_token_is_one_pass(decoder: Decoder, fp32: Decoder) -> None:
    stepped = step_by_step(decoder.start(batch=1, capacity=len(SEQUENCE)), SEQUENCE)
    assert np.abs(stepped - one_pass(decoder, SEQUENCE)).max() < TOKEN_BY_TOKEN[precision_of(decoder, fp32)]


def test_an_append_of_one_token_is_a_decode_step(decoder: Decoder) -> None:
    stepped, one_appended = (decoder.start(batch=1, capacity=60) for _ in range(2))
    for decoding in (stepped, one_appended):
        decoding.prefill(0, SEQUENCE[:10])
    assert np.array_equal(stepped.decode_step(SEQUENCE[10:11])[0], one_appended.prefill(0, SEQUENCE[10:11]))


def test_the_last_tokens_logits_alone_are_those_among_all(decoder: Decoder) -> None:
    prefilled = decoder.start(batch=1, capacity=60).prefill(0, SEQUENCE)
    assert np.abs(prefilled - one_pass(decoder, SEQUENCE)[-1]).max() < LAST_ONLY


def test_prefill_gives_the_same_bits_whatever_the_chunks(decoder: Decoder) -> None:
    whole, chunked = (
        decoder.start(batch=1, capacity=60).prefill(0, SEQUENCE, chunk_tokens=chunk_tokens)
        for chunk_tokens in (CHUNK_TOKENS, 7)
    )
    assert np.array_equal(whole, chunked)


@pytest.mark.parametrize("length", [33, 34, 64])
def test_short_heads_have_attention_take_fewer_tokens_at_a_time(tiny_fp32: Path, length: int) -> None:
    decoder = open_decoder(open_package(tiny_fp32))
    assert decoder.attention_rows == 32
    ids = SEQUENCE[np.arange(length) % 60] % 257
    assert np.array_equal(one_pass(decoder, ids), in_parts(decoder, ids, [9] * (length // 9 - 1) + [9 + length % 9]))


@given(length=st.integers(1, 2000), chunk_tokens=st.integers(-1, 300), rows=st.sampled_from([32, 96, 128, 256]))
def test_pieces_cover_a_prompt_and_none_is_a_single_token(length: int, chunk_tokens: int, rows: int) -> None:
    cut = list(pieces(length, chunk_tokens, attention_rows=rows))
    assert [place for piece in cut for place in range(piece.start, piece.stop)] == list(range(length))
    sizes = [piece.stop - piece.start for piece in cut]
    assert all(2 <= size <= max(3, chunk_tokens) and size % rows != 1 for size in sizes) or length == 1


# Batches


def test_a_ragged_step_gives_each_row_what_it_gets_alone(decoder: Decoder) -> None:
    lengths = (3, 29, 11, 1)
    together = decoder.start(batch=len(lengths), capacity=60)
    alone = [decoder.start(batch=1, capacity=60) for _ in lengths]
    for row, length in enumerate(lengths):
        together.prefill(row, SEQUENCE[:length])
        alone[row].prefill(0, SEQUENCE[:length])
    for step in range(12):
        ids = SEQUENCE[[length + step for length in lengths]]
        logits = together.decode_step(ids)
        for row, decoding in enumerate(alone):
            assert np.abs(logits[row] - decoding.decode_step(ids[row : row + 1])[0]).max() <= RAGGED_STEP


def test_a_step_of_the_first_rows_leaves_the_others_alone(decoder: Decoder) -> None:
    decoding, alone = (decoder.start(batch=batch, capacity=60) for batch in (3, 1))
    for row in range(3):
        decoding.prefill(row, SEQUENCE[: 4 + row])
    alone.prefill(0, SEQUENCE[:4])
    for place in range(5):
        logits = decoding.decode_step(SEQUENCE[place : place + 2])
        assert logits.shape == (2, decoder.config.n_vocab)
        assert np.abs(logits[0] - alone.decode_step(SEQUENCE[place : place + 1])[0]).max() <= RAGGED_STEP
    assert decoding.cache.lengths.tolist() == [9, 10, 6]
    behind = decoding.prefill(2, SEQUENCE[6:8]).copy()
    assert np.array_equal(behind, decoder.start(batch=1, capacity=60).prefill(0, SEQUENCE[:8]))


def test_rows_may_be_prefilled_in_turns(decoder: Decoder) -> None:
    decoding = decoder.start(batch=2, capacity=60)
    decoding.prefill(1, SEQUENCE[:9])
    decoding.prefill(0, SEQUENCE[30:50])
    resumed = decoding.prefill(1, SEQUENCE[9:20]).copy()
    assert np.array_equal(resumed, decoder.start(batch=1, capacity=60).prefill(0, SEQUENCE[:20]))


def test_lengths_count_each_rows_tokens(fp32: Decoder) -> None:
    decoding = fp32.start(batch=2, capacity=10)
    decoding.prefill(1, SEQUENCE[:4])
    decoding.decode_step(SEQUENCE[:2])
    assert decoding.cache.lengths.tolist() == [1, 5]


def test_memory_that_holds_no_token_is_never_read(decoder: Decoder) -> None:
    clean, littered = (decoder.start(batch=2, capacity=40) for _ in range(2))
    for _, _, buffer in littered.cache.bindings(slice(0, 2)):
        buffer[...] = np.nan
    for decoding in (clean, littered):
        decoding.prefill(0, SEQUENCE[:20])
        decoding.prefill(1, SEQUENCE[:3])
    assert np.array_equal(clean.decode_step(SEQUENCE[:2]), littered.decode_step(SEQUENCE[:2]))


# The cache


def test_growth_in_the_midst_changes_no_bit(decoder: Decoder) -> None:
    roomy, tight = decoder.start(batch=2, capacity=60), decoder.start(batch=2, capacity=2)
    for decoding in (roomy, tight):
        decoding.prefill(0, SEQUENCE[:5])
        decoding.prefill(1, SEQUENCE[:2])
    for place in range(20):
        ids = SEQUENCE[place : place + 2]
        assert np.array_equal(roomy.decode_step(ids), tight.decode_step(ids))
    assert tight.cache.capacity < roomy.cache.capacity


def test_steps_write_in_place_and_never_move_the_buffers(fp32: Decoder) -> None:
    decoding = fp32.start(batch=2, capacity=30)
    before = addresses(decoding)
    for row in range(2):
        decoding.prefill(row, SEQUENCE[: 5 + row])
    for place in range(20):
        decoding.decode_step(SEQUENCE[place : place + 2])
    assert addresses(decoding) == before


def test_a_step_touches_only_the_new_tokens_place(fp32: Decoder) -> None:
    decoding = fp32.start(batch=1, capacity=30)
    decoding.prefill(0, SEQUENCE[:5])
    before = [buffer.copy() for _, _, buffer in decoding.cache.bindings(slice(0, 1))]
    decoding.decode_step(SEQUENCE[5:6])
    for old, (_, _, buffer) in zip(before, decoding.cache.bindings(slice(0, 1)), strict=True):
        assert np.array_equal(old[:, :, :5], buffer[:, :, :5])
        assert np.array_equal(old[:, :, 6:], buffer[:, :, 6:], equal_nan=True)
        assert (buffer[:, :, 5] != 0).any()


def test_scoring_takes_a_cache_of_the_sequences_own_length(fp32: Decoder) -> None:
    decoding = fp32.start(batch=1, capacity=len(SEQUENCE))
    decoding.prefill(0, SEQUENCE)
    assert decoding.cache.capacity == len(SEQUENCE)


# Refusals


def test_no_ids_are_refused(fp32: Decoder) -> None:
    with pytest.raises(RequestError, match="no token ids to run, expected at least one"):
        fp32.logits(np.empty(0, np.int64))


def test_more_ids_than_the_context_are_refused(fp32: Decoder) -> None:
    with pytest.raises(RequestError, match="513 tokens do not fit the model's context of 512; shorten the prompt"):
        fp32.logits(np.zeros(513, np.int64))


@pytest.mark.parametrize("token_id", [-1, 8192])
def test_an_id_that_the_model_lacks_is_refused(fp32: Decoder, token_id: int) -> None:
    with pytest.raises(RequestError, match=f"token id {token_id} is not in the model, expected 0 to 8191"):
        fp32.logits(np.array([5, token_id]))


@pytest.mark.parametrize("ids", [np.array([1.0, 2.0]), np.array([[1, 2]]), np.array([True, False])])
def test_what_is_no_row_of_integers_is_refused(fp32: Decoder, ids: NDArray[np.int64]) -> None:
    with pytest.raises(RequestError, match=r"token ids have shape \(.*\) and dtype .*, expected one row of integers"):
        fp32.logits(ids)


def test_a_step_beyond_the_context_is_refused_and_changes_nothing(fp32: Decoder) -> None:
    decoding = fp32.start(batch=2, capacity=512)
    decoding.prefill(1, np.resize(SEQUENCE, 512))
    with pytest.raises(RequestError, match="513 tokens do not fit"):
        decoding.decode_step(SEQUENCE[:2])
    assert decoding.cache.lengths.tolist() == [0, 512]


def test_a_step_takes_no_more_ids_than_there_are_rows(fp32: Decoder) -> None:
    with pytest.raises(RequestError, match="3 ids for 2 rows, expected at most one for each"):
        fp32.start(batch=2, capacity=4).decode_step(SEQUENCE[:3])


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_that_is_not_there_is_refused(fp32: Decoder, row: int) -> None:
    with pytest.raises(RequestError, match=f"no row {row}, expected 0 to 1"):
        fp32.start(batch=2, capacity=4).prefill(row, SEQUENCE[:3])


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.uint64])
def test_integers_of_any_width_are_token_ids(fp32: Decoder, dtype: type[np.int64]) -> None:
    assert np.array_equal(one_pass(fp32, SEQUENCE[:9].astype(dtype)), one_pass(fp32, SEQUENCE[:9]))


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space, as Linux can")
def test_memory_that_runs_out_during_a_run_is_the_machines_failure(demo_fp32: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
import numpy as np
from runtime import huge_pages
from runtime.errors import MachineError
from runtime.package import open_package
from runtime.text_generator import open_decoder

huge_pages.SETTINGS = Path("/none")  # or its thread leaves memory behind that the limit counts as taken
decoding = open_decoder(open_package(sys.argv[1]), threads=1).start(batch=1, capacity=512)
decoding.prefill(0, np.arange(2))
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**20,) * 2)
try:
    decoding.prefill(0, np.arange(510), chunk_tokens=510)
except MachineError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(demo_fp32)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.startswith("onnxruntime failed to run the model ("), done.stderr
    assert done.stdout.endswith("free memory and run again\n")
    assert done.stderr == ""
