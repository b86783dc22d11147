"""Keys and values in int8: a quarter of the memory, the same rules as float32, and what it costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

import export.convert
import runtime.info
from export.convert import convert
from quantization.divergence import kl_divergence
from quantization.recipes import CACHE_MARGIN, cache_scale
from runtime import RequestError
from runtime.decoder import Decoder, Decoding
from runtime.kv_cache import Buffer, KVCache
from runtime.package import (
    ATTENTION_MASK,
    CACHE_KINDS,
    INPUT_IDS,
    LOGITS,
    MODEL_FILES,
    POSITION_IDS,
    open_package,
    past_name,
    present_name,
    read_manifest,
)
from runtime.text_generator import TextGenerator, open_decoder
from runtime.verify import replay

from .conftest import DEMO_CHECKPOINT
from .tiny import tiny_config

KL_OF_THE_CACHE = 0.0005
"""Nats a token that an int8 cache may add on the demo model. Measured: 0.0002."""

IDS = np.random.default_rng(5).integers(0, 8000, 90)

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def package(demo_int8_kv8: Path) -> Path:
    return demo_int8_kv8


@pytest.fixture(scope="module")
def decoder(package: Path) -> Decoder:
    return open_decoder(open_package(package))


def logits(decoder: Decoder, ids: NDArray[np.int64], chunk_tokens: int) -> NDArray[np.float32]:
    return np.concatenate([piece.copy() for piece in decoder.logits(ids, chunk_tokens=chunk_tokens)])


def test_the_cache_takes_a_quarter_of_the_memory(package: Path, decoder: Decoder) -> None:
    manifest = read_manifest(package)
    assert (manifest.kv_cache, manifest.cache_bytes_per_token) == ("int8", 2 * 6 * 256)
    cache = decoder.start(batch=2, capacity=10).cache
    buffers = [buffer for _, _, buffer in cache.bindings(slice(0, 2))]
    assert sum(buffer.nbytes for buffer in buffers) == 2 * 10 * manifest.cache_bytes_per_token


def test_the_graph_says_so(package: Path) -> None:
    model = onnx.load(package / MODEL_FILES["int8"], load_external_data=False)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    assert types[past_name(3, "value")] == TensorProto.INT8


def test_pieces_give_the_bits_of_one_run(decoder: Decoder) -> None:
    np.testing.assert_array_equal(logits(decoder, IDS, 7), logits(decoder, IDS, len(IDS)))


def test_onnx_finds_no_fault(package: Path) -> None:
    onnx.checker.check_model(package / MODEL_FILES["int8"], full_check=True)


def first_layer(decoding: Decoding) -> list[Buffer]:
    """Keys and values [H, T, D] of the only row."""
    cache = decoding.cache
    bound = list(cache.bindings(slice(0, 1)))[: len(CACHE_KINDS)]
    return [buffer[0, :, : cache.lengths[0]] for _, _, buffer in bound]


def test_a_prompt_fills_the_cache_as_steps_do(decoder: Decoder) -> None:
    """In the first layer, whose input is the same either way: the two branches quantize alike."""
    at_once, one_by_one = decoder.start(batch=1, capacity=100), decoder.start(batch=1, capacity=100)
    at_once.prefill(0, IDS)
    for token in IDS:
        one_by_one.decode_step(np.array([token]))
    for written, stepped in zip(first_layer(at_once), first_layer(one_by_one), strict=True):
        np.testing.assert_array_equal(written, stepped)
        assert np.abs(written).max() > 50


def run_whole(decoder: Decoder, rows: list[NDArray[np.int64]], room: int) -> dict[str, NDArray[np.generic]]:
    """Run left-padded prompts as other clients do, in buffers for `room` tokens: all outputs by name."""
    config, length = decoder.config, max(map(len, rows))
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows], np.int64)
    empty = np.zeros((len(rows), config.n_head, room, config.head_dim), np.int8)
    feeds = {past_name(layer, kind): empty for layer in range(config.n_layer) for kind in CACHE_KINDS}
    feeds[INPUT_IDS] = np.array([[0] * (length - len(row)) + list(row) for row in rows], np.int64)
    feeds[ATTENTION_MASK] = mask
    feeds[POSITION_IDS] = np.maximum(mask.cumsum(axis=1) - 1, 0)
    names = [output.name for output in decoder.session.get_outputs()]
    return dict(zip(names, decoder.session.run(names, feeds), strict=True))


@pytest.mark.parametrize("room", [0, 64], ids=["grown by onnxruntime", "with room"])
def test_padded_prompts_give_what_they_give_alone(decoder: Decoder, room: int) -> None:
    rows = [IDS[:30], IDS[40:57]]
    outputs = run_whole(decoder, rows, room)
    assert outputs[present_name(3, "key")].shape == (2, 4, room or 30, 64)
    for row, ids in enumerate(rows):
        alone = np.concatenate([piece.copy() for piece in decoder.logits(ids)])
        got = outputs[LOGITS][row, -len(ids) :]
        assert kl_divergence(alone, got).max() < KL_OF_THE_CACHE


def test_rows_of_different_lengths_decode_as_they_do_alone(decoder: Decoder) -> None:
    lengths, together = (30, 9, 17), decoder.start(batch=3, capacity=40)
    for row, length in enumerate(lengths):
        together.prefill(row, IDS[:length])
    for step in range(4):
        got = together.decode_step(np.array([IDS[length + step] for length in lengths])).copy()
        for row, length in enumerate(lengths):
            alone = decoder.start(batch=1, capacity=40)
            alone.prefill(0, IDS[:length])
            for earlier in range(step + 1):
                expected = alone.decode_step(IDS[[length + earlier]])
            np.testing.assert_allclose(got[row], expected[0], atol=1e-5)


def test_golden_prompts_are_replayed(package: Path, decoder: Decoder) -> None:
    assert all(replay(decoder, golden).held for golden in read_manifest(package).golden)


def test_it_costs_little(demo_fp32: Path, demo_int8: Path, decoder: Decoder) -> None:
    reference = TextGenerator.load(demo_fp32)
    ids = reference.generate("", max_new_tokens=400, min_new_tokens=400).prompt_ids
    sample = reference.generate("", max_new_tokens=400, min_new_tokens=400).samples[0].ids
    sequence = np.array([*ids, *sample], np.int64)
    expected = logits(reference.decoder, sequence, 128)
    plain = kl_divergence(expected, logits(open_decoder(open_package(demo_int8)), sequence, 128)).mean()
    assert kl_divergence(expected, logits(decoder, sequence, 128)).mean() < plain + KL_OF_THE_CACHE


def test_a_scale_reaches_beyond_the_largest_that_was_met() -> None:
    items = np.array([[1, -8, 0, 2], [-4, 6, 0, 1]], np.float32)
    scale = cache_scale(items, n_head=2)
    assert scale.shape == (1, 2, 1, 2)
    np.testing.assert_allclose(scale.ravel() * 127 / CACHE_MARGIN, [4, 8, 1e-6, 2], rtol=1e-6)


def test_a_cache_of_int8_grows_and_repeats_as_any() -> None:
    cache = KVCache(tiny_config(), batch=2, capacity=4, cache_type="int8")
    for _, _, buffer in cache.bindings(slice(0, 1)):
        buffer[...] = 7
    cache.lengths[0] = 4
    cache.copy_row(0, 1)
    cache.reserve(9)
    assert all(
        (buffer[:, :, :4] == 7).all() and buffer.dtype == np.int8 for _, _, buffer in cache.bindings(slice(0, 2))
    )


def test_info_tells_the_cache(package: Path, capsys: Capture) -> None:
    assert runtime.info.main([str(package)]) == 0
    assert "kv cache               int8" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--precision", "fp32"], ["--exporter", "optimum"]])
def test_what_has_no_scales_has_no_int8_cache(tmp_path: Path, capsys: Capture, arguments: list[str]) -> None:
    output = tmp_path / "package"
    status = export.convert.main([str(DEMO_CHECKPOINT), "--kv-cache", "int8", "--output", str(output), *arguments])
    assert status == 2
    assert "int8 keys and values need a calibrated package and a graph of our own" in capsys.readouterr().err
    assert not output.exists()


def test_the_same_is_refused_in_a_program(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="take --precision int8 or int4"):
        convert(DEMO_CHECKPOINT, tmp_path / "package", precision="fp32", kv_cache="int8")
