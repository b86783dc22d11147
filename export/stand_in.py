"""The CPU in place of another device: it has all operators of a package's graph, and so a conversion needs no GPU.

What it shows is that the graph is the model. It does not show the device's own rounding, kernels or overflows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from quantization.int8 import ZERO_POINT
from runtime.decoder import Decoder
from runtime.package import Manifest
from runtime.place import CPU
from runtime.processor import available_processors
from runtime.receipt import RECORD, prove
from runtime.session import FATAL_ONLY, Opened
from runtime.wheel import load_onnxruntime


def stand_in_decoder(model_path: Path, manifest: Manifest) -> Decoder:
    """Open a graph that was made for another device on the CPU.

    onnxruntime has no int8 kernels for float16 there, and would dequantize each matrix anew at every run; it is made to
    do so once. For the demo model that is ten times as fast.
    """
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = available_processors(), 1
    options.log_severity_level = FATAL_ONLY
    # Source: onnxruntime_session_options_config_keys.h
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry(*RECORD)
    model = onnx.load(model_path, load_external_data=False)
    spread = [each for node in model.graph.node for each in _without_byte_blocks(node)]
    del model.graph.node[:]
    model.graph.node.extend(spread)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(ZERO_POINT), "stand_in/zero"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2]), "stand_in/last"))
    changed_path = model_path.with_name("stand_in.onnx")  # beside the weights
    try:
        changed_path.write_bytes(model.SerializeToString())
        session = ort.InferenceSession(str(changed_path), options, providers=["CPUExecutionProvider"])
    finally:
        changed_path.unlink(missing_ok=True)
    opened = Opened(session, prove(session, CPU, None))
    return Decoder(opened, manifest.config, manifest.attention, manifest.kv_cache)


def _without_byte_blocks(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """A product by 8-bit blocks as one by a matrix, (values - 128) * scale, that is computed from constants."""
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    if node.op_type != "MatMulNBits" or attributes["bits"] != 8:
        yield node
        return
    x, values, scale = node.input
    name = node.output[0]
    wide, steps, column, centred = (f"{name}/stand_in/{part}" for part in ("values", "steps", "column", "centred"))
    blocks, rows, used, matrix = (f"{name}/stand_in/{part}" for part in ("blocks", "rows", "used", "matrix"))
    inputs, product = f"{name}/stand_in/inputs", f"{name}/stand_in/product"
    ends = [f"{name}/stand_in/{part}" for part in ("shape", "start", "end", "axis")]
    for end, numbers in zip(ends, ([0, -1], [0], [attributes["K"]], [1]), strict=True):
        yield helper.make_node("Constant", [], [end], value_ints=numbers)
    yield helper.make_node("Cast", [values], [wide], to=TensorProto.FLOAT)
    yield helper.make_node("Cast", [scale], [steps], to=TensorProto.FLOAT)
    yield helper.make_node("Unsqueeze", [steps, "stand_in/last"], [column])
    yield helper.make_node("Sub", [wide, "stand_in/zero"], [centred])
    yield helper.make_node("Mul", [centred, column], [blocks])  # [N, blocks, size]
    yield helper.make_node("Reshape", [blocks, ends[0]], [rows])
    yield helper.make_node("Slice", [rows, *ends[1:]], [used])  # [N, K]
    yield helper.make_node("Transpose", [used], [matrix], perm=[1, 0])
    yield helper.make_node("Cast", [x], [inputs], to=TensorProto.FLOAT)
    yield helper.make_node("MatMul", [inputs, matrix], [product])
    yield helper.make_node("Cast", [product], [name], to=TensorProto.FLOAT16)
