"""What operators CUDA, TensorRT and browsers take, as data, and what a graph asks for.

CUDA: the kernels that onnxruntime-gpu 1.31.1 registers for its CUDAExecutionProvider (`get_all_opkernel_def`), for the
operators that our graphs use; the types are those of the first input.

TensorRT: docs/operators.md of onnx-tensorrt, "TensorRT 10.0 supports operators in the inclusive range of opset 9 to
opset 20", as of release 10.1 (commit 96e7811), for the same operators; the types are those that it lists.

Browsers: what sessions for the processor opened with in onnxruntime-web 1.31.0-dev.20260914's build "asyncify", which
transformers.js 4.3.1 loads by itself. It lacks GatherBlockQuantized, which the plain build has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnxruntime

MICROSOFT = "com.microsoft"
FLOATS = {"float", "float16"}
ANY = {"float", "float16", "int32", "int64", "bool"}

CUDA: Mapping[tuple[str, str], set[str]] = {
    ("", "Add"): {"float", "float16", "int32", "int64"},
    ("", "ArgMax"): FLOATS,
    ("", "Cast"): ANY,
    ("", "Gather"): ANY,
    ("", "MatMul"): FLOATS,
    ("", "Mul"): {"float", "float16", "int32", "int64"},
    ("", "ReduceSum"): {"float", "float16", "int32", "int64"},
    ("", "Relu"): FLOATS,
    ("", "Reshape"): ANY,
    ("", "Shape"): ANY,
    ("", "Sigmoid"): FLOATS,
    ("", "Slice"): ANY,
    ("", "Squeeze"): ANY,
    ("", "Sub"): {"float", "float16", "int32", "int64"},
    ("", "TopK"): {"float", "float16", "int32", "int64"},
    ("", "Unsqueeze"): ANY,
    (MICROSOFT, "BiasGelu"): FLOATS,
    (MICROSOFT, "FastGelu"): FLOATS,
    (MICROSOFT, "FusedMatMul"): FLOATS,
    (MICROSOFT, "GatherBlockQuantized"): {"uint8"},
    (MICROSOFT, "GroupQueryAttention"): {"float16"},
    (MICROSOFT, "MatMulNBits"): FLOATS,
    (MICROSOFT, "SkipLayerNormalization"): FLOATS,
}

TENSORRT_OPSET = 20
TENSORRT: Mapping[tuple[str, str], set[str]] = {
    ("", "Add"): {"float", "float16", "int32", "int64"},
    ("", "And"): {"bool"},
    ("", "ArgMax"): {"float", "float16", "int32", "int64"},
    ("", "Cast"): ANY,
    ("", "Concat"): ANY,
    ("", "DequantizeLinear"): {"int8"},
    ("", "Gather"): ANY,
    ("", "Gelu"): {"float", "float16", "int8", "int32", "int64"},
    ("", "LayerNormalization"): FLOATS,
    ("", "LessOrEqual"): {"float", "float16", "int32", "int64"},
    ("", "MatMul"): FLOATS,
    ("", "Mul"): {"float", "float16", "int32", "int64"},
    ("", "QuantizeLinear"): FLOATS,
    ("", "Range"): {"float", "float16", "int32", "int64"},
    ("", "Relu"): FLOATS | {"int32", "int64"},
    ("", "Reshape"): ANY,
    ("", "Shape"): ANY,
    ("", "Sigmoid"): FLOATS,
    ("", "Slice"): ANY,
    ("", "Softmax"): FLOATS,
    ("", "Split"): ANY,
    ("", "Squeeze"): ANY,
    ("", "Sub"): {"float", "float16", "int32", "int64"},
    ("", "Transpose"): ANY,
    ("", "Unsqueeze"): ANY,
    ("", "Where"): ANY,
}

WEB: Mapping[tuple[str, str], set[str]] = {
    ("", "Abs"): {"float"},
    ("", "Add"): {"float"},
    ("", "BitShift"): {"uint8"},
    ("", "BitwiseAnd"): {"uint8"},
    ("", "Cast"): {"int64", "uint8"},
    ("", "Concat"): {"int64", "uint8"},
    ("", "Div"): {"float"},
    ("", "Expand"): {"float"},
    ("", "Gather"): {"float", "uint8"},
    ("", "LayerNormalization"): {"float"},
    ("", "MatMul"): {"float"},
    ("", "Mul"): {"float", "int64"},
    ("", "Neg"): {"int64"},
    ("", "QuantizeLinear"): {"float"},
    ("", "Range"): {"int64"},
    ("", "ReduceMax"): {"float", "int64"},
    ("", "Relu"): {"float"},
    ("", "Reshape"): {"float", "uint8"},
    ("", "Shape"): {"int64"},
    ("", "Sigmoid"): {"float"},
    ("", "Slice"): {"float"},
    ("", "Squeeze"): {"int64"},
    ("", "Sub"): {"float"},
    ("", "Unsqueeze"): {"float", "uint8"},
    (MICROSOFT, "BiasGelu"): {"float"},
    (MICROSOFT, "FastGelu"): {"float"},
    (MICROSOFT, "FusedMatMul"): {"float"},
    (MICROSOFT, "GroupQueryAttention"): {"float"},
    (MICROSOFT, "MatMulIntegerToFloat"): {"uint8"},
    (MICROSOFT, "MatMulNBits"): {"float"},
}


def operators(path: Path) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Each node of a graph and the type of its first input, as onnxruntime infers it."""
    types = value_types(path)
    for node in onnx.load(path, load_external_data=False).graph.node:
        yield node, types[node.input[0]]


def value_types(path: Path) -> dict[str, str]:
    """Name of each value -> its type, as "float16": every value is made an output, which onnxruntime gives a type."""
    model = onnx.load(path, load_external_data=False)
    known = {proto.name: onnx.TensorProto.DataType.Name(proto.data_type).lower() for proto in model.graph.initializer}
    known |= {
        value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
        for value in model.graph.input
    }
    outputs = {value.name for value in model.graph.output}
    inner = [name for node in model.graph.node for name in node.output if name and name not in outputs]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    shown = path.with_name("shown.onnx")  # beside its weights
    shown.write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(shown), options, providers=["CPUExecutionProvider"])
    return known | {value.name: value.type.removeprefix("tensor(").rstrip(")") for value in session.get_outputs()}
