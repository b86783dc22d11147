"""Logits in float16 without losing what is next to the largest: the head's rows are stored around their mean.

GPT-2's logits have a large part in common, -30 to -100, beside which float16 keeps steps of 1/32 to 1/16: two tokens
of nearly the same probability become one number. That part is the product of the last hidden state and the mean row of
the table, and no choice depends on it. So the rows are stored less their mean, the mean stands as one more row behind
them, and the sum of both products is taken in float32. A tied table is the embedding too: there the mean goes into the
positions, which are added to every row anyway.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import TensorProto

from runtime.config import GPT2Config
from runtime.package import LOGITS, NEXT_IDS

from .checkpoint import EMBEDDING, HEAD
from .checkpoint_files import Float32Array
from .lazy_tensors import LazyTensors
from .onnx_builder import GraphBuilder
from .products import Table

POSITIONS = "wpe.weight"


class CentredTensors(LazyTensors[Float32Array]):
    """The same model as `tensors`, its head [V + 1, D] around the mean of its rows, which comes last."""

    def __init__(self, config: GPT2Config, tensors: Mapping[str, Float32Array]) -> None:
        super().__init__(tensors)
        self._tensors = tensors
        self._tied = config.tie_word_embeddings
        self._head = EMBEDDING if self._tied else HEAD
        self._mean: Float32Array | None = None  # [D]

    def __getitem__(self, name: str) -> Float32Array:
        array = self._tensors[name]
        if name == self._head:
            mean = self._mean_of(array)
            return np.concatenate([array - mean, mean[None]])
        if name == POSITIONS and self._tied:
            return array + (self._mean_of(self._tensors[self._head]) if self._mean is None else self._mean)
        return array

    def _mean_of(self, table: Float32Array) -> Float32Array:
        if self._mean is None:
            self._mean = table.mean(axis=0, dtype=np.float64).astype(np.float32)
        return self._mean


def write_logits(graph: GraphBuilder, table: Table, hidden: str, n_vocab: int) -> None:
    """The outputs that a centred table [V + 1 or more, D] gives: logits [B, S, V] float32, and the largest's ids."""
    node = graph.node
    first, n_rows, after, last_axis = (graph.constant([value], np.int64) for value in (0, n_vocab, n_vocab + 1, -1))
    half = table.logits(graph, hidden, "head/product")  # [B, S, V + 1 or more]
    products = node("Cast", [half], "head/products", to=TensorProto.FLOAT)
    own = node("Slice", [products, first, n_rows, last_axis], "head/own")  # [B, S, V]
    shared = node("Slice", [products, n_rows, after, last_axis], "head/shared")  # [B, S, 1]
    node("Add", [own, shared], LOGITS)
    node("ArgMax", [LOGITS], NEXT_IDS, axis=-1, keepdims=0)  # of equal logits the lowest id, as on the CPU
