"""The graph: its signature, its files, and its numbers against the oracle, however rows are padded or cut."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from export.graph import HEAD_DIM_STEP, build_graph
from export.onnx_builder import ALIGNMENT, WeightsFile
from export.reference import reference_logits
from quantization.recipes import TABLE_BLOCK_SIZES
from runtime.config import GPT2Config
from runtime.decoder import Decoder
from runtime.errors import ConfigError
from runtime.package import Precision
from tests.operator_lists import WEB, operators
from tests.tiny import tiny_config, tiny_weights

FP32_ERROR = 1e-5
"""Between fp32 logits and the oracle's, which have a spread of about 0.6. Measured: 2.4e-6."""

INT8_ERROR = 0.15
"""Between int8 logits and the oracle's, likewise. Measured: 0.069."""

INT4_ERROR = 1.5
"""Likewise, rounded plainly. Measured: 0.84."""

PADDING_ERROR: Mapping[Precision, float] = {"fp32": 2e-6, "int8": 0.05, "int4": 0.05}
"""Between a row among padding and the row alone. Measured: 5e-7 and 0; but where the float error is not 0, it may turn
a rounding of int8. A wrong mask costs 1.4."""

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8", "int4")
CONFIG = tiny_config()
VARIANTS: Mapping[str, GPT2Config] = {
    "plain": CONFIG,
    "gelu": replace(CONFIG, activation="gelu"),
    "relu": replace(CONFIG, activation="relu"),
    "silu": replace(CONFIG, activation="silu"),
    "n_inner 7": replace(CONFIG, n_inner=7),
    "n_inner 1": replace(CONFIG, n_inner=1),
    "unscaled": replace(CONFIG, scale_attn_weights=False),
    "scaled by layer": replace(CONFIG, scale_attn_by_inverse_layer_idx=True),
    "scaled by layer only": replace(CONFIG, scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True),
    "untied": replace(CONFIG, tie_word_embeddings=False),
    "epsilon 0.1": replace(CONFIG, layer_norm_epsilon=0.1),
    "epsilon 1e-12": replace(CONFIG, layer_norm_epsilon=1e-12),
    "one token": replace(CONFIG, n_vocab=1, eos_token_id=0),
    "7919 tokens": replace(CONFIG, n_vocab=7919),
    "heads of 8, a table that no block divides": replace(CONFIG, n_embd=24, n_head=3, n_inner=96),
    "smaller than a block": replace(CONFIG, n_embd=8, n_head=1, n_inner=32),
    "one head": replace(CONFIG, n_head=1),
    "heads of 24": replace(CONFIG, n_embd=72, n_head=3, n_inner=288),
    "odd context, one layer": replace(CONFIG, n_ctx=63, n_layer=1),
    "a context of one": replace(CONFIG, n_ctx=1),
}

Ids = NDArray[np.int64]
Float32Array = NDArray[np.float32]


def write_model(folder: Path, config: GPT2Config, tensors: Mapping[str, Float32Array], precision: Precision) -> Path:
    path = folder / "model.onnx"
    with (folder / "model.onnx_data").open("wb") as file:
        model = build_graph(config, tensors, precision, WeightsFile(file, "model.onnx_data"))
    path.write_bytes(model.SerializeToString())
    return path


def tiny_decoder(folder: Path, config: GPT2Config, precision: Precision) -> Decoder:
    return Decoder.open(write_model(folder, config, tiny_weights(config), precision), config)


@pytest.fixture(scope="module", params=PRECISIONS)
def each_precision(request: pytest.FixtureRequest) -> Precision:
    precision: Precision = request.param
    return precision


@pytest.fixture(scope="module")
def decoder(each_precision: Precision, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return tiny_decoder(tmp_path_factory.mktemp("graph"), CONFIG, each_precision)


@pytest.fixture(scope="module")
def padding_error(each_precision: Precision) -> float:
    return PADDING_ERROR[each_precision]


def token_rows(config: GPT2Config, *lengths: int) -> list[Ids]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, config.n_vocab, length) for length in lengths]


def run(
    decoder: Decoder, ids: Ids, mask: Ids, positions: Ids, past: Sequence[Float32Array] = (), *, keep: int | None = None
) -> list[Float32Array]:
    """The graph as other clients run it, without our cache: logits, then present keys and values."""
    config = decoder.config
    feed: dict[str, NDArray[Any]] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    if keep is not None:
        feed["num_logits_to_keep"] = np.array([keep])
    names = [f"past_key_values.{layer}.{kind}" for layer in range(config.n_layer) for kind in ("key", "value")]
    empty = np.zeros((len(ids), config.n_head, 0, config.head_dim), np.float32)
    feed |= dict(zip(names, past or [empty] * len(names), strict=True))
    result: list[Float32Array] = decoder.session.run(None, feed)
    return result


def alone(decoder: Decoder, ids: Ids) -> Float32Array:
    logits: Float32Array = run(decoder, ids[None], np.ones((1, len(ids)), np.int64), np.arange(len(ids))[None])[0][0]
    return logits


# What the graph says it is


def signature(values: Sequence[onnx.ValueInfoProto]) -> dict[str, tuple[int, list[int | str]]]:
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inputs_and_outputs_are_those_that_clients_expect(tmp_path: Path, precision: Precision) -> None:
    graph = onnx.load(write_model(tmp_path, CONFIG, tiny_weights(CONFIG), precision), load_external_data=False).graph
    total = "past_sequence_length + sequence_length"
    past: list[int | str] = ["batch_size", 2, "past_sequence_length", 16]
    present: list[int | str] = ["batch_size", 2, total, 16]
    layers = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert signature(graph.input) == {
        "input_ids": (TensorProto.INT64, ["batch_size", "sequence_length"]),
        "attention_mask": (TensorProto.INT64, ["batch_size", total]),
        "position_ids": (TensorProto.INT64, ["batch_size", "sequence_length"]),
        **{f"past_key_values.{name}": (TensorProto.FLOAT, past) for name in layers},
        "num_logits_to_keep": (TensorProto.INT64, [1]),
    }
    assert signature(graph.output) == {
        "logits": (TensorProto.FLOAT, ["batch_size", "sequence_length", 131]),
        **{f"present.{name}": (TensorProto.FLOAT, present) for name in layers},
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_onnx_finds_no_fault(tmp_path: Path, variant: str, precision: Precision) -> None:
    config = VARIANTS[variant]
    path = write_model(tmp_path, config, tiny_weights(config), precision)
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert model.ir_version == 10
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 21, "com.microsoft": 1}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_operator_is_one_that_browsers_have(tmp_path: Path, variant: str, precision: Precision) -> None:
    config = VARIANTS[variant]
    path = write_model(tmp_path, config, tiny_weights(config), precision)
    for node, first_type in operators(path):
        known = WEB.get((node.domain, node.op_type), set())
        assert first_type in known, f"{node.name}: {node.op_type} of {first_type}"


def test_names_are_unique_and_nothing_is_left_unused(tmp_path: Path) -> None:
    graph = onnx.load(write_model(tmp_path, CONFIG, tiny_weights(CONFIG), "int8"), load_external_data=False).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    used = {name for node in graph.node for name in node.input}
    assert {initializer.name for initializer in graph.initializer} <= used
    assert {value.name for value in graph.input} <= used


# What is on disk


def stored(path: Path) -> dict[str, int]:
    """Initializer -> bytes, after a look at where each lies."""
    content = onnx.load(path, load_external_data=False).graph.initializer
    weights, end, sizes = path.with_name("model.onnx_data"), 0, {}
    for initializer in content:
        where = {item.key: item.value for item in initializer.external_data}
        if where:
            assert where["location"] == "model.onnx_data"
            assert int(where["offset"]) == -(-end // ALIGNMENT) * ALIGNMENT
            end = int(where["offset"]) + int(where["length"])
        sizes[initializer.name] = int(where["length"]) if where else len(initializer.raw_data)
    assert end == weights.stat().st_size
    return {
        name: size for name, size in sizes.items() if not name.startswith("constant/") and name != "num_logits_to_keep"
    }


@pytest.mark.parametrize("tied", [True, False])
def test_fp32_stores_every_parameter_once(tmp_path: Path, tied: bool) -> None:
    config = replace(CONFIG, tie_word_embeddings=tied)
    sizes = stored(write_model(tmp_path, config, tiny_weights(config), "fp32"))
    assert sum(sizes.values()) == 4 * config.parameter_count
    assert ("lm_head.weight" in sizes) == (not tied)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_head", [1, 3])
def test_int8_stores_bytes_and_scales(tmp_path: Path, tied: bool, n_head: int) -> None:
    config = replace(CONFIG, n_head=n_head, n_embd=8 * n_head, tie_word_embeddings=tied)
    sizes = stored(write_model(tmp_path, config, tiny_weights(config), "int8"))
    embd, inner, block = config.n_embd, config.n_inner, TABLE_BLOCK_SIZES["int8"][-1]
    blocks = -(-embd // block)
    tables = (1 if tied else 2) * config.n_vocab * blocks * (block + 4)
    matrices = config.n_layer * (4 * embd * embd + 2 * embd * inner)
    scales = biases = config.n_layer * (3 * embd + embd + inner + embd)
    norms = (2 * config.n_layer + 1) * 2 * embd
    assert sum(sizes.values()) == tables + matrices + 4 * (scales + biases + norms + config.n_ctx * embd)


def test_each_tensor_is_read_once(tmp_path: Path) -> None:
    class Once(dict[str, Float32Array]):
        def __getitem__(self, name: str) -> Float32Array:
            return self.pop(name)

    tensors = Once(tiny_weights(CONFIG))
    write_model(tmp_path, CONFIG, tensors, "int8")
    assert not tensors


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, CONFIG, tiny_weights(CONFIG), "int8")
    for name in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# Its numbers against the oracle


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", FP32_ERROR), ("int8", INT8_ERROR), ("int4", INT4_ERROR)])
def test_equals_the_oracle(tmp_path: Path, variant: str, precision: Precision, tolerance: float) -> None:
    config = VARIANTS[variant]
    decoder = tiny_decoder(tmp_path, config, precision)
    for ids in token_rows(config, 1, min(20, config.n_ctx), config.n_ctx):
        (expected,) = reference_logits(config, tiny_weights(config), [ids])
        np.testing.assert_allclose(alone(decoder, ids), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("n_head", [32, 16, 8])
def test_heads_that_onnxruntime_refuses_are_refused_before_anything_is_written(tmp_path: Path, n_head: int) -> None:
    config = replace(CONFIG, n_head=n_head)
    assert config.head_dim % HEAD_DIM_STEP
    with pytest.raises(ConfigError, match=re.escape(f"= 32 / {n_head} = {config.head_dim} numbers are not supported")):
        write_model(tmp_path, config, {}, "fp32")
    assert not (tmp_path / "model.onnx_data").read_bytes()


# How many logits


def test_num_logits_to_keep_keeps_the_last(decoder: Decoder, padding_error: float) -> None:
    (ids,) = token_rows(CONFIG, 9)
    feed = ids[None], np.ones((1, 9), np.int64), np.arange(9)[None]
    whole = run(decoder, *feed)[0]
    assert whole.shape == (1, 9, CONFIG.n_vocab)
    for keep, expected in [(0, whole), (1, whole[:, -1:]), (4, whole[:, -4:]), (9, whole), (20, whole)]:
        kept = run(decoder, *feed, keep=keep)[0]
        np.testing.assert_allclose(kept, expected, rtol=0, atol=padding_error)


# Padding, pieces, buffers


def padded(rows: Sequence[Ids], side: str) -> tuple[Ids, Ids, Ids]:
    """Ids, mask and positions [B, longest]."""
    longest = max(map(len, rows))
    ids, mask, positions = np.zeros((3, len(rows), longest), np.int64)
    for row, tokens in enumerate(rows):
        span = slice(longest - len(tokens), longest) if side == "left" else slice(0, len(tokens))
        ids[row, span], mask[row, span], positions[row, span] = tokens, 1, np.arange(len(tokens))
    return ids, mask, positions


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_the_row_alone(decoder: Decoder, padding_error: float, side: str) -> None:
    rows = token_rows(CONFIG, 3, 17, 9, 1)
    ids, mask, positions = padded(rows, side)
    together = run(decoder, ids, mask, positions)[0]
    assert np.isfinite(together).all()
    for row, tokens in enumerate(rows):
        np.testing.assert_allclose(together[row, mask[row] == 1], alone(decoder, tokens), rtol=0, atol=padding_error)


def test_a_left_padded_batch_goes_on_step_by_step(decoder: Decoder, padding_error: float) -> None:
    """What optimum and transformers.js do: the cache grows, the mask keeps its zeros on the left."""
    rows = token_rows(CONFIG, 4, 11)
    masks = [padded(rows, "left")[1], *(np.ones((1, len(tokens)), np.int64) for tokens in rows)]
    results = [run(decoder, *padded(rows, "left")), *(run(decoder, *padded([tokens], "left")) for tokens in rows)]
    for step in range(3):
        chosen = results[0][0][:, -1:].argmax(axis=-1)  # [2, 1]
        ends = np.array([[len(tokens) + step] for tokens in rows])
        masks = [np.pad(mask, ((0, 0), (0, 1)), constant_values=1) for mask in masks]
        for index, which in enumerate([slice(0, 2), slice(0, 1), slice(1, 2)]):  # both, and each alone
            past = results[index][1:]
            results[index] = run(decoder, chosen[which], masks[index], ends[which], past)
            assert results[index][1].shape[2] == masks[index].shape[1]
        for row in range(2):
            np.testing.assert_allclose(results[0][0][row], results[1 + row][0][0], rtol=0, atol=padding_error)


def test_a_row_of_padding_alone_stays_finite(decoder: Decoder, padding_error: float) -> None:
    ids = np.stack(token_rows(CONFIG, 5, 5))
    mask, positions = np.array([[0] * 5, [1] * 5]), np.tile(np.arange(5), (2, 1))
    logits, *present = run(decoder, ids, mask, positions)
    assert all(np.isfinite(values).all() for values in (logits, *present))
    np.testing.assert_allclose(logits[1], alone(decoder, ids[1]), rtol=0, atol=padding_error)


def test_rows_of_different_lengths_append_to_a_longer_buffer(decoder: Decoder, padding_error: float) -> None:
    rows = token_rows(CONFIG, 3, 17, 9)
    shared = decoder.start(batch=3, capacity=40)
    singles = [decoder.start(batch=1, capacity=30) for _ in rows]
    for row, tokens in enumerate(rows):
        together = shared.prefill(row, tokens[:-2]).copy()
        np.testing.assert_array_equal(together, singles[row].prefill(0, tokens[:-2]))
    for step in (-2, -1):
        logits = shared.decode_step(np.array([tokens[step] for tokens in rows]))
        for row, tokens in enumerate(rows):
            expected = singles[row].decode_step(tokens[step:][:1])[0]
            np.testing.assert_allclose(logits[row], expected, rtol=0, atol=padding_error)
