"""Graphs that return keys and values in new tensors: a model that counts tells exactly what each row was shown.

Its key of a token is the token's one-hot row; its logits are how often each id was seen, and the position, times 1,000,
added to id 0. So every expected logit is a whole number, and a wrong mask, position or cache entry is seen at once.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from export.graph import IR_VERSION, OPSET, declare_inputs, declare_outputs, last_positions
from export.onnx_builder import GraphBuilder, WeightsFile
from runtime.config import GPT2Config
from runtime.decoder import Decoder
from runtime.package import ATTENTION_MASK, CACHE_KINDS, INPUT_IDS, LOGITS, POSITION_IDS, past_name, present_name

V = 8
CONFIG = GPT2Config(n_layer=1, n_head=1, n_embd=V, n_ctx=64, n_vocab=V, n_inner=V, eos_token_id=0)
PER_POSITION = 1000
IDS = np.random.default_rng(5).integers(0, V, 64)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = tmp_path_factory.mktemp("counting") / "model.onnx"
    with path.with_name("model.onnx_data").open("wb") as file:
        graph = GraphBuilder(WeightsFile(file, "model.onnx_data"))
        write_counting_model(graph)
    path.write_bytes(graph.model(name="counts", opset=OPSET, ir_version=IR_VERSION, producer="").SerializeToString())
    return Decoder.open(path, CONFIG, attention="plain")


def write_counting_model(graph: GraphBuilder) -> None:
    declare_inputs(graph, CONFIG)
    node, constant = graph.node, graph.constant
    new = node("Gather", [graph.weight("one_hot", np.eye(V, dtype=np.float32)), INPUT_IDS], "new")  # [B, S, V]
    key = node("Unsqueeze", [new, constant([1], np.int64)], "key")  # [B, 1, S, V]
    for kind in CACHE_KINDS:
        node("Concat", [past_name(0, kind), key], present_name(0, kind), axis=2)
    mask = node("Cast", [ATTENTION_MASK], "mask", to=TensorProto.FLOAT)
    shown = node("Unsqueeze", [mask, constant([1, 3], np.int64)], "shown")  # [B, 1, T, 1]
    counted = node("CumSum", [node("Mul", [present_name(0, "key"), shown], "seen"), constant(2, np.int64)], "counted")
    start = node("Neg", [node("Shape", [INPUT_IDS], "n_new", start=1, end=2)], "start")
    of_new = node("Slice", [counted, start, constant([1 << 62], np.int64), constant([2], np.int64)], "of_new")
    counts = node("Squeeze", [of_new, constant([1], np.int64)], "counts")  # [B, S, V]
    place = node("Cast", [POSITION_IDS], "place", to=TensorProto.FLOAT)
    column = node("Unsqueeze", [place, constant([2], np.int64)], "column")  # [B, S, 1]
    first = graph.weight("first", np.eye(1, V, dtype=np.float32) * PER_POSITION)  # [1, V]
    whole = node("Add", [counts, node("Mul", [column, first], "placed")], "whole")
    node("Identity", [last_positions(graph, whole)], LOGITS)
    declare_outputs(graph, CONFIG)


def expected(ids: NDArray[np.int64]) -> NDArray[np.float32]:
    counts = np.bincount(ids, minlength=V).astype(np.float32)
    counts[0] += PER_POSITION * (len(ids) - 1)
    return counts


@pytest.mark.parametrize("chunk_tokens", [2, 3, 7, 64])
def test_every_token_sees_all_before_it_whatever_the_pieces(decoder: Decoder, chunk_tokens: int) -> None:
    logits = np.concatenate([piece.copy() for piece in decoder.logits(IDS, chunk_tokens=chunk_tokens)])
    np.testing.assert_array_equal(logits, [expected(IDS[: end + 1]) for end in range(len(IDS))])


def test_rows_of_any_length_see_their_own_tokens_only(decoder: Decoder) -> None:
    decoding, lengths = decoder.start(batch=3, capacity=2), (7, 1, 30)  # grows on the way
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(decoding.prefill(row, IDS[:length]), expected(IDS[:length]))
    for step in range(5):
        logits = decoding.decode_step(IDS[[length + step for length in lengths]])
        np.testing.assert_array_equal(logits, [expected(IDS[: length + step + 1]) for length in lengths])
    assert decoding.cache.lengths.tolist() == [12, 6, 35]


def test_an_empty_row_beside_a_long_one_starts_at_its_own_beginning(decoder: Decoder) -> None:
    decoding = decoder.start(batch=2, capacity=20)
    decoding.prefill(1, IDS[:9])
    logits = decoding.decode_step(IDS[[0, 9]])
    np.testing.assert_array_equal(logits, [expected(IDS[:1]), expected(IDS[:10])])


def test_a_row_may_be_resumed_after_steps_of_all(decoder: Decoder) -> None:
    decoding = decoder.start(batch=2, capacity=20)
    decoding.prefill(0, IDS[:9])
    decoding.decode_step(IDS[[9, 0]])
    np.testing.assert_array_equal(decoding.prefill(1, IDS[1:6]), expected(IDS[:6]))
    np.testing.assert_array_equal(decoding.decode_step(IDS[[10, 6]]), [expected(IDS[:11]), expected(IDS[:7])])


def test_a_repeated_row_goes_on_in_every_row(decoder: Decoder) -> None:
    decoding = decoder.start(batch=3, capacity=20)
    decoding.prefill(0, IDS[:9])
    for row in (1, 2):
        decoding.cache.copy_row(0, row)
    ids = np.array([1, 2, 3])
    np.testing.assert_array_equal(decoding.decode_step(ids), [expected(np.array([*IDS[:9], i])) for i in ids])
