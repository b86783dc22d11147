"""Decoding with all buffers on a device: the same numbers as with the cache in numpy, here in the CPU's memory."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from export.top_k_graph import MOST, write_top_k_graph
from runtime.decoder import Decoder
from runtime.device_decoder import DeviceDecoder, DeviceDecoding
from runtime.errors import RequestError
from runtime.sampling import SamplingOptions, choose_token
from runtime.session import Opened
from tests.device_graphs import CONFIG, write_device_graph
from tests.tiny import tiny_weights

IDS = np.random.default_rng(2).integers(0, CONFIG.n_vocab, 64)
ERROR = 0.004
"""As in test_device_graphs. Measured: 0.0005."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return write_device_graph(tmp_path_factory.mktemp("graph"), "cuda", "fp16").decoder


@pytest.fixture
def decoder(plain: Decoder, tmp_path: Path) -> DeviceDecoder:
    write_top_k_graph(tmp_path / "top_k.onnx", CONFIG)
    top_k = onnxruntime.InferenceSession(str(tmp_path / "top_k.onnx"), providers=["CPUExecutionProvider"])
    return DeviceDecoder(Opened(plain.session, plain.receipt), CONFIG, top_k=top_k, device="cpu", captures=False)


@pytest.fixture
def short(decoder: DeviceDecoder, monkeypatch: pytest.MonkeyPatch) -> DeviceDecoder:
    """With masks and buffers of 8, 16, 32 and 64 tokens."""
    monkeypatch.setattr("runtime.device_memory.SHORTEST", 8)
    return decoder


def test_rows_of_different_lengths_give_what_they_give_in_numpy(plain: Decoder, short: DeviceDecoder) -> None:
    expected, decoding = plain.start(batch=3, capacity=60), short.start(batch=3, capacity=3)  # grows on the way
    for row, length in enumerate((3, 17, 9)):
        first = expected.prefill(row, IDS[:length])
        np.testing.assert_allclose(decoding.prefill(row, IDS[:length]), first, rtol=0, atol=ERROR)
    for step in range(20):
        ids = IDS[[step, step + 1, step + 2]]
        np.testing.assert_allclose(decoding.decode_step(ids), expected.decode_step(ids), rtol=0, atol=ERROR)
    assert decoding.cache.lengths.tolist() == [23, 37, 29]
    assert decoding.cache.capacity == 64


def test_pieces_equal_one_run_and_logits_of_all_tokens_come(plain: Decoder, short: DeviceDecoder) -> None:
    whole = np.concatenate([piece.copy() for piece in plain.logits(IDS[:40])])
    cut = np.concatenate([piece.copy() for piece in short.logits(IDS[:40], chunk_tokens=7)])
    np.testing.assert_allclose(cut, whole, rtol=0, atol=ERROR)


def test_the_first_rows_may_go_on_alone(plain: Decoder, decoder: DeviceDecoder) -> None:
    expected, decoding = plain.start(batch=1, capacity=20), decoder.start(batch=3, capacity=20)
    for row in range(3):
        decoding.prefill(row, IDS[: 5 + row])
    expected.prefill(0, IDS[:5])
    logits = decoding.decode_step(IDS[5:6])
    np.testing.assert_allclose(logits, expected.decode_step(IDS[5:6]), rtol=0, atol=ERROR)
    assert decoding.cache.lengths.tolist() == [6, 6, 7]


def test_a_copied_row_goes_on_as_its_source(decoder: DeviceDecoder) -> None:
    decoding = decoder.start(batch=3, capacity=20)
    decoding.prefill(0, IDS[:9])
    decoding.cache.copy_row(0, 1)
    decoding.cache.copy_row(0, 2, tokens=4)
    logits = decoding.decode_step(IDS[[9, 9, 4]])
    np.testing.assert_array_equal(logits[0], logits[1])
    alone = decoder.start(batch=1, capacity=20).prefill(0, IDS[:5])
    np.testing.assert_allclose(logits[2], alone, rtol=0, atol=ERROR)


def test_buffers_and_bound_steps_are_used_again_by_the_next_decoding(decoder: DeviceDecoder) -> None:
    decoding = decoder.start(batch=2, capacity=20)
    decoding.prefill(0, IDS[:3])
    first = decoding.decode_step(IDS[:1]).copy()
    buffers, steps = decoding.cache.buffers, dict(decoding.cache.buffers.steps)
    other = decoder.start(batch=2, capacity=20)
    assert other.cache.buffers is not buffers
    del decoding
    gc.collect()
    again = decoder.start(batch=2, capacity=20)
    assert again.cache.buffers is buffers
    again.prefill(0, IDS[:3])
    np.testing.assert_array_equal(again.decode_step(IDS[:1]), first)
    assert again.cache.buffers.steps == steps


def test_each_number_of_rows_and_mask_length_has_a_graph_of_its_own(short: DeviceDecoder) -> None:
    decoding = short.start(batch=2, capacity=20)
    decoding.prefill(0, IDS[:6])
    decoding.prefill(1, IDS[:6])
    for n_rows in (2, 2, 1, 2):  # the first row: 7, 8, 9 and 10 tokens
        decoding.decode_step(IDS[:n_rows])
    steps = decoding.cache.buffers.steps
    assert set(steps) == {(2, 8), (1, 16), (2, 16)}
    assert len({step.graph_id for step in steps.values()}) == 3


def test_greedy_choice_needs_only_an_id(decoder: DeviceDecoder) -> None:
    decoding, every = decoder.start(batch=2, capacity=20), decoder.start(batch=2, capacity=20)
    for each in (decoding, every):
        each.prefill(0, IDS[:4])
        each.prefill(1, IDS[4:7])
    chosen, logits = decoding.decode_step(IDS[:2], wanted=1), every.decode_step(IDS[:2])
    np.testing.assert_array_equal(chosen.argmax(axis=1), logits.argmax(axis=1))


@pytest.mark.parametrize("top_k", [2, 40, MOST, MOST + 1])
def test_sampling_from_what_was_picked_chooses_the_same_ids(decoder: DeviceDecoder, top_k: int) -> None:
    decoding, every = decoder.start(batch=1, capacity=20), decoder.start(batch=1, capacity=20)
    options = SamplingOptions(top_k=top_k, top_p=0.9, temperature=0.8)
    for each in (decoding, every):
        each.prefill(0, IDS[:4])
    picked, logits = decoding.decode_step(IDS[:1], wanted=top_k)[0], every.decode_step(IDS[:1])[0]
    assert np.isinf(picked).any() == (top_k < MOST)
    for uniform in np.linspace(0, 1, 50, endpoint=False):
        assert choose_token(picked, options, uniform) == choose_token(logits, options, uniform)


def test_ties_that_may_have_been_cut_bring_all_logits(plain: Decoder, tmp_path: Path) -> None:
    weights = tiny_weights(CONFIG)
    weights["wte.weight"][:] = 0  # all logits are equal
    graph = write_device_graph(tmp_path, "cuda", "fp16", tensors=weights).decoder
    write_top_k_graph(tmp_path / "top_k.onnx", CONFIG)
    top_k = onnxruntime.InferenceSession(str(tmp_path / "top_k.onnx"), providers=["CPUExecutionProvider"])
    decoding = DeviceDecoder(
        Opened(graph.session, graph.receipt), CONFIG, top_k=top_k, device="cpu", captures=False
    ).start(batch=1, capacity=9)
    assert np.isfinite(decoding.decode_step(IDS[:1], wanted=40)).all()


def test_what_cannot_be_run_is_refused(decoder: DeviceDecoder) -> None:
    with pytest.raises(RequestError, match="a cache of 0 rows"):
        decoder.start(batch=0, capacity=4)
    decoding = decoder.start(batch=1, capacity=4)
    with pytest.raises(RequestError, match="2 ids for 1 rows"):
        decoding.decode_step(IDS[:2])
    with pytest.raises(RequestError, match="no row 1, expected 0 to 0"):
        decoding.prefill(1, IDS[:2])
    with pytest.raises(RequestError, match="token id 131 is not in the model"):
        decoding.decode_step(np.array([131]))
    decoding.prefill(0, IDS)
    with pytest.raises(RequestError, match="65 tokens do not fit"):
        decoding.decode_step(IDS[:1])


def test_a_row_is_taken_out_cut_and_put_back(decoder: DeviceDecoder) -> None:
    source, target = decoder.start(batch=2, capacity=20), decoder.start(batch=2, capacity=20)
    source.prefill(1, IDS[:9])
    held = source.cache.row(1)
    assert (held.shape, held.dtype) == ((2 * CONFIG.n_layer, CONFIG.n_head, 9, CONFIG.head_dim), np.float16)
    target.insert(0, held[:, :, :4])
    target.insert(0, held[:, :, 4:])
    target.cache.truncate(0, 8)
    np.testing.assert_array_equal(target.cache.row(0), held[:, :, :8])
    again = target.prefill(0, IDS[8:10]).copy()
    np.testing.assert_allclose(source.prefill(1, IDS[9:10]), again, rtol=0, atol=ERROR)


def test_one_thread_at_a_time_has_the_device_do_something(
    decoder: DeviceDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, busy, together = decoder.run, threading.Lock(), []

    def watched(*args: Any, **kwargs: Any) -> None:
        together.append(not busy.acquire(blocking=False))
        time.sleep(0.001)  # long enough for the others to come
        run(*args, **kwargs)
        if not together[-1]:
            busy.release()

    monkeypatch.setattr(decoder, "run", watched)

    def work(length: int) -> NDArray[np.float32]:
        decoding = decoder.start(batch=1, capacity=20)
        decoding.prefill(0, IDS[:length])
        return np.concatenate([decoding.decode_step(IDS[step : step + 1]) for step in range(10)])

    expected = [work(length) for length in (3, 5, 7, 9)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, (3, 5, 7, 9)))
    assert not any(together)
    for own, alone in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own, alone)


def test_a_prompt_is_run_in_one_piece(decoder: DeviceDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []
    run_piece = DeviceDecoding._run_piece
    monkeypatch.setattr(
        DeviceDecoding,
        "_run_piece",
        lambda self, row, ids, **options: pieces.append(ids.shape[1]) or run_piece(self, row, ids, **options),
    )
    length = 2 * CONFIG.head_dim + 1  # the CPU would leave a token alone behind whole rows of attention, and cuts
    decoder.start(batch=1, capacity=length).prefill(0, IDS[:length])
    assert pieces == [length]


def test_memory_that_nobody_uses_is_given_up_for_what_is_asked_for(
    decoder: DeviceDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    del decoder.start(batch=2, capacity=20).cache
    gc.collect()
    zeros, tries = decoder.memory._zeros, itertools.count()

    def full_at_first(shape: tuple[int, ...]) -> list[Any]:
        if not next(tries):
            raise RuntimeError("out of memory")
        assert not decoder.memory._idle
        return zeros(shape)

    monkeypatch.setattr(decoder.memory, "_zeros", full_at_first)
    assert decoder.start(batch=3, capacity=20).cache.batch == 3
    assert next(tries) == 2
