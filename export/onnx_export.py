"""A folder that optimum exported -> its graph, checked, and a checkpoint recovered from the graph's own weights.

What is expected: config.json, and model.onnx or onnx/model.onnx with the inputs and outputs of
`export.graph.input_shapes`, float32 weights under Hugging Face's names, and a head that is a product by the
embedding's transpose or by a matrix of its own. Anything else is refused: the weights are what the oracle computes
with, and a graph of which they are not known cannot be held against anything.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from runtime.config import GPT2Config
from runtime.errors import CheckpointError
from runtime.package import CONFIG, LOGITS, MANIFEST

from .checkpoint import EMBEDDING, HEAD, Checkpoint, canonical_shapes, checkpoint_name
from .checkpoint_config import read_hf_config
from .checkpoint_files import Float32Array, is_plain_name
from .graph import OPSET, input_shapes, output_shapes
from .lazy_tensors import LazyTensors
from .onnx_builder import MICROSOFT

MODEL_NAMES = ("model.onnx", "onnx/model.onnx")
PREFIX = "transformer."
OLDEST_OPSET = 18
"""Reductions take their axes as an input since then, which is how the int8 products are written."""
DOMAINS = ("", "ai.onnx", MICROSOFT)
FEWEST_INPUTS = {"MatMul": 2, "Gemm": 2, "Gather": 2, "Transpose": 1}
ATTRIBUTES = frozenset(
    getattr(AttributeProto, name) for name in ("FLOAT", "INT", "STRING", "TENSOR", "FLOATS", "INTS", "STRINGS")
)
FAULTS_SHOWN = 8
EXPORT_AGAIN = "export it again with: optimum-cli export onnx --task text-generation-with-past"


@dataclass(frozen=True, slots=True)
class OnnxExport:
    """A graph that was checked.

    Attributes:
        checkpoint: its weights by canonical name, read from the graph; layout "onnx".
        model: the graph; external weights are not loaded.
        spelling: canonical name -> initializer, of all but the head.
        head: the product that gives the logits, and the initializer that it multiplies by.
        constants: every initializer of the graph, by its own name.
    """

    checkpoint: Checkpoint
    model: onnx.ModelProto
    spelling: Mapping[str, str]
    head: Head
    constants: Constants

    @property
    def opset(self) -> int:
        return _opset(self.model)


@dataclass(frozen=True, slots=True)
class Head:
    """logits = hidden @ weight, or hidden @ weight.T where the graph transposes it."""

    node: onnx.NodeProto
    hidden: str
    initializer: str
    transposed: bool


def read_onnx_export(folder: Path) -> OnnxExport:
    """Read and check a folder that optimum exported.

    Args:
        folder: holds config.json and the graph.
    Raises:
        CheckpointError: there is no such graph, or it is not one that can be adopted; faults of one kind are all named.
    """
    path = _find_model(folder)
    _, declared = read_hf_config(folder / CONFIG)
    model = _parse(path)
    if declared.n_layer > len(model.graph.input):  # before names are made up for so many layers
        raise CheckpointError(
            f"{path} has {len(model.graph.input)} inputs, config.json says n_layer {declared.n_layer}"
        )
    _refuse(path, [*_foreign_parts(model), *_signature_faults(model, declared)])
    constants = Constants(path, model)
    head = _find_head(path, model, constants)
    config, spelling = _match_weights(path, declared, constants, head)
    tensors = GraphTensors(constants, config, spelling, head)
    checkpoint = Checkpoint(
        folder=folder, name=checkpoint_name(folder), layout="onnx", config=config, source_config={}, tensors=tensors
    )
    return OnnxExport(checkpoint, model, spelling, head, constants)


class GraphTensors(LazyTensors[Float32Array]):
    """Canonical name -> array, read from the graph's initializers at the moment it is asked for."""

    def __init__(self, constants: Constants, config: GPT2Config, spelling: Mapping[str, str], head: Head) -> None:
        super().__init__(canonical_shapes(config))
        self._constants = constants
        self._spelling = spelling
        self._head = head

    def __getitem__(self, name: str) -> Float32Array:
        if name not in self:
            raise KeyError(name)
        if name == HEAD:
            stored = self._constants.read(self._head.initializer)
            array = stored if self._head.transposed else stored.T
        else:
            array = self._constants.read(self._spelling[name])
        if not np.isfinite(array).all():
            raise CheckpointError(f"{self._constants.path}: {name} holds NaN or Inf; {EXPORT_AGAIN}")
        return np.ascontiguousarray(array, np.float32)


class Constants:
    """The constants of a graph, inside the file or beside it."""

    def __init__(self, path: Path, model: onnx.ModelProto) -> None:
        self.path = path
        self._protos = {proto.name: proto for proto in model.graph.initializer}

    def __contains__(self, name: str) -> bool:
        return name in self._protos

    def describe(self, name: str) -> tuple[int, tuple[int, ...]]:
        """Data type and shape."""
        return self._protos[name].data_type, tuple(self._protos[name].dims)

    def read(self, name: str) -> NDArray[Any]:
        """The constant as an array.

        Raises:
            CheckpointError: it lies outside the folder, or its bytes are not what its shape asks for.
        """
        proto = self._protos[name]
        try:
            if proto.data_location == TensorProto.EXTERNAL:
                return self._read_external(proto)
            return numpy_helper.to_array(proto)
        except (ValueError, TypeError, KeyError, OverflowError, OSError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{self.path}: {name[:80]!r} cannot be read: {reason}; {EXPORT_AGAIN}") from error

    def _read_external(self, proto: TensorProto) -> NDArray[Any]:
        where = {entry.key: entry.value for entry in proto.external_data}
        path = _beside(self.path, where.get("location", ""))
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(proto.data_type))
        if not dtype.isbuiltin:
            raise ValueError(f"of type {TensorProto.DataType.Name(proto.data_type)}, not supported in a file beside")
        shape = tuple(proto.dims)
        if min(shape, default=0) < 0:
            raise ValueError(f"of shape {list(shape)}")
        n_bytes, offset = math.prod(shape) * dtype.itemsize, int(where.get("offset", 0))
        size = path.stat().st_size
        if int(where.get("length", n_bytes)) != n_bytes or offset < 0 or offset + n_bytes > size:
            raise ValueError(f"{n_bytes} bytes at {offset} of {path.name}, which has {size}, expected {shape} {dtype}")
        with path.open("rb") as file:
            file.seek(offset)
            return np.frombuffer(file.read(n_bytes), dtype.newbyteorder("<")).reshape(shape)


def _beside(model_path: Path, location: str) -> Path:
    """The file that external data names, if it is one in the graph's own folder when every link is followed."""
    folder, path = model_path.parent.resolve(), model_path.parent / location
    if not is_plain_name(location) or Path(location).is_absolute() or ".." in Path(location).parts:
        raise ValueError(f"its data lie in {reprlib.repr(location)}, expected a file beside the graph")
    if not path.resolve().is_relative_to(folder):
        raise ValueError(f"its data lie in {location!r}, a link that leads out of the folder")
    return path


# --- the graph ---------------------------------------------------------------------------------------------------


def _find_model(folder: Path) -> Path:
    if (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} is a package already: python -m runtime.generate {folder}")
    found = [folder / name for name in MODEL_NAMES if (folder / name).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{folder} holds {' and '.join(MODEL_NAMES)}: remove the one that does not count")
    try:
        others = sorted(path.name for path in folder.rglob("*.onnx"))
    except OSError:
        others = []
    raise CheckpointError(
        f"{folder} is no export that can be read: looked for {' and '.join(MODEL_NAMES)}, found "
        f"{', '.join(others[:FAULTS_SHOWN]) or 'no .onnx file'}; {EXPORT_AGAIN}"
    )


def _parse(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # the parser's own, of no common root
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is no ONNX model: {reason}; copy it again") from error


def _foreign_parts(model: onnx.ModelProto) -> Iterator[str]:
    """What no export of a GPT-2 has, and whose effect would not be seen here."""
    domains = sorted({opset.domain for opset in model.opset_import} | {node.domain for node in model.graph.node})
    yield from (f"it has operators of domain {reprlib.repr(domain)}" for domain in domains if domain not in DOMAINS)
    if not OLDEST_OPSET <= _opset(model) <= OPSET:
        yield f"it is of opset {_opset(model)}, expected {OLDEST_OPSET} to {OPSET}: name one with --opset"
    if model.functions or model.graph.sparse_initializer:
        yield "it has functions or sparse weights"
    outputs = [value for node in model.graph.node for value in node.output if value]
    constants = [proto.name for proto in model.graph.initializer]
    if len(set(outputs)) != len(outputs) or len(set(constants)) != len(constants):
        yield "it gives a name twice"
    if not all(map(is_plain_name, constants)):
        yield "it has a weight whose name is not printable text"
    for node in model.graph.node:
        operator = reprlib.repr(node.op_type)
        if not node.output or len(node.input) < FEWEST_INPUTS.get(node.op_type, 0):
            yield f"it has a {operator} without inputs or outputs"
        for attribute in node.attribute:
            if attribute.type not in ATTRIBUTES:
                yield f"it has a {operator} with a graph or another attribute that is no plain value"
            if attribute.t.data_location == TensorProto.EXTERNAL:
                yield f"it has a constant of {operator} that lies in a file"


def _opset(model: onnx.ModelProto) -> int:
    return max((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _signature_faults(model: onnx.ModelProto, config: GPT2Config) -> Iterator[str]:
    """Inputs and outputs: no other names than ours, the same types, axes free where ours are and fixed where not."""
    for kind, values, expected in (
        ("input", model.graph.input, input_shapes(config)),
        ("output", model.graph.output, output_shapes(config)),
    ):
        found = {value.name: value.type.tensor_type for value in values}
        yield from (f"{kind} {name} is missing" for name in expected if name not in found)
        yield from (f"{kind} {reprlib.repr(name)} is unknown" for name in found if name not in expected)
        for name, (dtype, axes) in expected.items():
            if name not in found:
                continue
            dims = [axis.dim_value if axis.HasField("dim_value") else "free" for axis in found[name].shape.dim]
            wanted = ["free" if isinstance(axis, str) else axis for axis in axes]
            if found[name].elem_type != dtype or dims != wanted:
                yield (
                    f"{kind} {name} is {_type_name(found[name].elem_type)} {dims}, expected "
                    f"{_type_name(dtype)} {wanted}"
                )


def _type_name(dtype: int) -> str:
    return str(TensorProto.DataType.Name(dtype)) if dtype in TensorProto.DataType.values() else str(dtype)


# --- the weights -------------------------------------------------------------------------------------------------


def _find_head(path: Path, model: onnx.ModelProto, constants: Constants) -> Head:
    """The product that gives the logits; its matrix is a constant, or the transpose of one."""
    producers = {output: node for node in model.graph.node for output in node.output}
    node = producers.get(LOGITS)
    if node is not None and node.op_type == "MatMul" and len(node.input) == 2:
        hidden, matrix = node.input
        if matrix in constants:
            return Head(node, hidden, matrix, transposed=False)
        before = producers.get(matrix)
        if before is not None and before.op_type == "Transpose" and before.input[0] in constants:
            return Head(node, hidden, before.input[0], transposed=True)
    raise CheckpointError(
        f"{path}: logits come from {reprlib.repr(node.op_type) if node else 'no node'}, expected a MatMul of the last "
        f"hidden state by a constant; {EXPORT_AGAIN}"
    )


def _match_weights(
    path: Path, declared: GPT2Config, constants: Constants, head: Head
) -> tuple[GPT2Config, dict[str, str]]:
    """The configuration with the head as it is, and the initializers by canonical name."""
    config = replace(declared, tie_word_embeddings=_is_tied(declared, constants, head))
    shapes = canonical_shapes(config)
    spelling = {name: PREFIX + name for name in shapes if name != HEAD}
    stored = {name: (spelled, shapes[name]) for name, spelled in spelling.items()}
    if HEAD in shapes:
        stored[HEAD] = (head.initializer, shapes[HEAD] if head.transposed else shapes[HEAD][::-1])
    faults = [f"weight {spelled} is missing" for spelled, _ in stored.values() if spelled not in constants]
    for spelled, shape in stored.values():
        if spelled in constants and constants.describe(spelled) != (TensorProto.FLOAT, shape):
            dtype, dims = constants.describe(spelled)
            faults.append(f"{spelled} is {_type_name(dtype)} {list(dims)}, expected FLOAT {list(shape)}")
    _refuse(path, faults)
    return config, spelling


def _is_tied(declared: GPT2Config, constants: Constants, head: Head) -> bool:
    """Whether the head is the embedding, bit for bit, whatever config.json says; shapes are checked afterwards."""
    embedding = PREFIX + EMBEDDING
    if head.initializer == embedding:
        return True
    shape = (declared.n_vocab, declared.n_embd)
    head_shape = shape if head.transposed else shape[::-1]
    if (
        embedding not in constants
        or constants.describe(embedding) != (TensorProto.FLOAT, shape)
        or constants.describe(head.initializer) != (TensorProto.FLOAT, head_shape)
    ):
        return False
    matrix = constants.read(head.initializer)
    return bool(np.array_equal(constants.read(embedding), matrix if head.transposed else matrix.T))


def _refuse(path: Path, faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
        raise CheckpointError(f"{path} cannot be adopted: {'; '.join(faults[:FAULTS_SHOWN])}{more}; {EXPORT_AGAIN}")
