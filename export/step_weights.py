"""How much of a graph's weights one decode step must read, told from the graph itself.

A step multiplies by every matrix in full, however few rows it has; only tables that rows are picked from are not read
in full: the positions, and the embedding unless it is the head too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
from onnx import helper

ROW_LOOKUPS = {"Gather": (0,), "GatherBlockQuantized": (0, 2, 3)}
"""Operators that pick rows, and which of their inputs they pick from: the table, its scales and zero points."""

RESHAPERS = ("Unsqueeze", "Reshape")
"""What may stand between a table's scales and the operator that picks from them."""


def decode_weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all initializers that are read in full by a run, however few tokens it is given."""
    reads: dict[str, list[tuple[onnx.NodeProto, int]]] = {}  # by name of a value: who reads it, as which input
    for node in _nodes(model.graph):
        for place, name in enumerate(node.input):
            reads.setdefault(name, []).append((node, place))

    def is_picked_from(value: str) -> bool:
        return all(
            place in ROW_LOOKUPS.get(node.op_type, ())
            or (node.op_type in RESHAPERS and place == 0 and is_picked_from(node.output[0]))
            for node, place in reads.get(value, [])
        )

    return sum(_bytes(tensor) for tensor in model.graph.initializer if not is_picked_from(tensor.name))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of branches too: what prompts alone read is scales and little else."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _bytes(tensor: onnx.TensorProto) -> int:
    return int(math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
