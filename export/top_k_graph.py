"""The graph that picks the largest logits where they lie, so that a GPU sends some hundred bytes and not all of them.

It stands beside the model instead of in it: greedy choice needs none of it, and sampling beyond `MOST` takes them all.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from onnx import TensorProto

from runtime.config import GPT2Config
from runtime.package import LOGITS, TOP_IDS, TOP_LOGITS

from .graph import BATCH, IR_VERSION, OPSET
from .onnx_builder import GraphBuilder, WeightsFile

MOST = 64
"""Logits that are picked: 40 are what OpenAI sampled from, and what is beyond tells whether ties were cut."""


def write_top_k_graph(path: Path, config: GPT2Config) -> None:
    """logits [B, 1, V] float32 -> the `MOST` largest, the largest first: [B, MOST] float32, and their ids int64."""
    count = min(MOST, config.n_vocab)
    graph = GraphBuilder(WeightsFile(io.BytesIO(), ""))
    graph.input(LOGITS, TensorProto.FLOAT, [BATCH, 1, config.n_vocab])
    rows = graph.node("Squeeze", [LOGITS, graph.constant([1], np.int64)], "rows")
    graph.node_with_outputs("TopK", [rows, graph.constant([count], np.int64)], [TOP_LOGITS, TOP_IDS], axis=-1, sorted=1)
    graph.output(TOP_LOGITS, TensorProto.FLOAT, [BATCH, count])
    graph.output(TOP_IDS, TensorProto.INT64, [BATCH, count])
    model = graph.model(name="top_k", opset=OPSET, ir_version=IR_VERSION, producer="gpt2-edge", domains=("",))
    path.write_bytes(model.SerializeToString(deterministic=True))
