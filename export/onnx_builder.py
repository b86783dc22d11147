"""A graph under construction: nodes in order, weights streamed to the external data file as they are added."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from runtime.package import FileEntry

MICROSOFT = "com.microsoft"

INLINE_BYTES = 1024
"""Constants up to this size stand in the graph itself, where shape inference can read them."""

ALIGNMENT = 4096
"""Bytes; a weight that starts on a page can be mapped into memory as it is."""


class WeightsFile:
    """The external data file: arrays one behind the other, each on its own page."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        """`file` is open for writing; `location` is its path as the graph names it, relative to the graph's folder."""
        self._file = file
        self._location = location
        self._end = 0
        self._digest = hashlib.sha256()

    def entry(self) -> FileEntry:
        """Size and sha256 of what was written so far; nothing needs to be read again."""
        return FileEntry(self._end, self._digest.hexdigest())

    def append(self, name: str, array: NDArray[Any]) -> TensorProto:
        """Write the array now; return the initializer that points at it."""
        self._write(bytes(-self._end % ALIGNMENT))
        offset = self._end
        self._write(np.ascontiguousarray(array).data)
        proto = TensorProto(
            name=name,
            dims=array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", self._location), ("offset", offset), ("length", array.nbytes)):
            proto.external_data.add(key=key, value=str(value))
        return proto

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._end += len(content) if isinstance(content, bytes) else content.nbytes


class GraphBuilder:
    """Collects nodes, inputs, outputs and initializers. Names of values are the strings that its methods return."""

    def __init__(self, weights: WeightsFile) -> None:
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """Add an initializer; a large one goes to the weights file and is not kept."""
        if array.nbytes <= INLINE_BYTES:
            self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        else:
            self._initializers[name] = self._weights.append(name, array)
        return name

    def constant(self, value: Any, dtype: type[np.generic]) -> str:
        """A small constant, stored once however often it is asked for."""
        array = np.asarray(value, dtype)
        name = f"constant/{array.dtype}/" + "x".join(map(str, array.shape)) + "/" + ",".join(map(str, array.flat))
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def node(self, op_type: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output and return that output's name, which names the node too."""
        return self.node_with_outputs(op_type, inputs, [output], domain=domain, **attributes)[0]

    def node_with_outputs(
        self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> Sequence[str]:
        self._nodes.append(helper.make_node(op_type, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs

    def branch(self) -> GraphBuilder:
        """A graph that sees all values of this one, for `choose`; its weights and constants are stored here."""
        branch = GraphBuilder(self._weights)
        branch._initializers = self._initializers
        return branch

    def choose(self, condition: str, then: GraphBuilder, otherwise: GraphBuilder, outputs: Sequence[str]) -> None:
        """Append a node that runs one of two branches, and gives its outputs these names, in their order."""
        graphs = {
            attribute: helper.make_graph(branch._nodes, f"{outputs[0]}/{attribute}", [], branch._outputs)
            for attribute, branch in (("then_branch", then), ("else_branch", otherwise))
        }
        self.node_with_outputs("If", [condition], outputs, **graphs)

    def append(self, node: onnx.NodeProto) -> None:
        """Append a node that another graph has."""
        self._nodes.append(node)

    def model(
        self,
        *,
        name: str,
        opset: int,
        ir_version: int,
        producer: str,
        domains: Sequence[str] = ("", MICROSOFT),
    ) -> onnx.ModelProto:
        """The whole; `domains` are those of its operators, the version of onnxruntime's own being 1."""
        graph = helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(domain, 1 if domain else opset) for domain in domains],
            ir_version=ir_version,
            producer_name=producer,
        )
