"""Graphs under construction, and the weights file beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from export.onnx_builder import ALIGNMENT, INLINE_BYTES, GraphBuilder, WeightsFile
from runtime.package import file_entry

ARRAYS: dict[str, NDArray[Any]] = {
    "odd": np.arange(2001, dtype=np.int8),
    "matrix": np.arange(600, dtype=np.float32).reshape(20, 30),
    "page": np.full(ALIGNMENT, 7, np.uint8),
    "transposed": np.arange(600, dtype=np.float32).reshape(20, 30).T,
    "last": np.arange(1025, dtype=np.uint8),
}


def written(folder: Path) -> tuple[Path, dict[str, TensorProto]]:
    path = folder / "weights_data"
    with path.open("wb") as file:
        weights = WeightsFile(file, path.name)
        protos = {name: weights.append(name, array) for name, array in ARRAYS.items()}
    entry = weights.entry()
    assert entry == file_entry(path)
    return path, protos


def where(proto: TensorProto) -> dict[str, str]:
    return {item.key: item.value for item in proto.external_data}


def test_every_weight_starts_on_a_page_behind_the_one_before(tmp_path: Path) -> None:
    path, protos = written(tmp_path)
    end = 0
    for name, proto in protos.items():
        assert int(where(proto)["offset"]) == -(-end // ALIGNMENT) * ALIGNMENT
        assert int(where(proto)["length"]) == ARRAYS[name].nbytes
        end = int(where(proto)["offset"]) + ARRAYS[name].nbytes
    assert path.stat().st_size == end


def test_weights_are_read_back_by_onnx(tmp_path: Path) -> None:
    _, protos = written(tmp_path)
    for name, proto in protos.items():
        read = numpy_helper.to_array(proto, str(tmp_path))
        np.testing.assert_array_equal(read, ARRAYS[name])
        assert read.dtype == ARRAYS[name].dtype


def test_gaps_between_weights_are_zeros(tmp_path: Path) -> None:
    path, protos = written(tmp_path)
    content = bytearray(path.read_bytes())
    for proto in protos.values():
        start = int(where(proto)["offset"])
        content[start : start + int(where(proto)["length"])] = bytes(int(where(proto)["length"]))
    assert not any(content)


@pytest.mark.parametrize(("size", "external"), [(INLINE_BYTES, False), (INLINE_BYTES + 1, True)])
def test_only_large_weights_leave_the_graph(tmp_path: Path, size: int, external: bool) -> None:
    with (tmp_path / "data").open("wb") as file:
        builder = GraphBuilder(WeightsFile(file, "data"))
        assert builder.weight("w", np.zeros(size, np.uint8)) == "w"
    (proto,) = builder.model(name="g", opset=21, ir_version=10, producer="p").graph.initializer
    assert (proto.data_location == TensorProto.EXTERNAL) == external
    assert (tmp_path / "data").stat().st_size == (size if external else 0)


def test_a_constant_is_stored_once_and_others_beside_it(tmp_path: Path) -> None:
    with (tmp_path / "data").open("wb") as file:
        builder = GraphBuilder(WeightsFile(file, "data"))
    names = [builder.constant(value, np.int64) for value in (1, 1, [1], [1, 2])] + [builder.constant(1, np.float32)]
    assert names[0] == names[1]
    assert len(set(names)) == 4
    initializers = builder.model(name="g", opset=21, ir_version=10, producer="p").graph.initializer
    assert [numpy_helper.to_array(proto).tolist() for proto in initializers] == [1, [1], [1, 2], 1.0]


def test_a_model_is_what_was_appended(tmp_path: Path) -> None:
    with (tmp_path / "data").open("wb") as file:
        builder = GraphBuilder(WeightsFile(file, "data"))
        x = builder.input("x", TensorProto.FLOAT, ["rows", 2])
        squared = builder.node("Mul", [x, x], "squared")
        builder.output(
            builder.node("Add", [squared, builder.constant(1, np.float32)], "y"), TensorProto.FLOAT, ["rows", 2]
        )
    model = builder.model(name="g", opset=21, ir_version=10, producer="someone")
    onnx.checker.check_model(model, full_check=True)
    assert [(node.op_type, node.name) for node in model.graph.node] == [("Mul", "squared"), ("Add", "y")]
    assert (model.ir_version, model.producer_name) == (10, "someone")
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 21, "com.microsoft": 1}


@pytest.mark.parametrize("condition", [True, False])
def test_one_of_two_branches_runs(tmp_path: Path, condition: bool) -> None:
    with (tmp_path / "weights").open("wb") as file:
        builder = GraphBuilder(WeightsFile(file, "weights"))
        asked, x = builder.input("asked", TensorProto.BOOL, []), builder.input("x", TensorProto.FLOAT, [2])
        doubled, halved = builder.branch(), builder.branch()
        for branch, name, factor in ((doubled, "doubled", 2), (halved, "halved", 0.5)):
            branch.node("Mul", [x, branch.constant(factor, np.float32)], name)
            branch.output(name, TensorProto.FLOAT, [2])
        builder.choose(asked, doubled, halved, ["y"])
        builder.output("y", TensorProto.FLOAT, [2])
    model = builder.model(name="g", opset=21, ir_version=10, producer="test", domains=("",))
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"asked": np.array(condition), "x": np.array([3, -1], np.float32)})
    np.testing.assert_array_equal(y, [6, -2] if condition else [1.5, -0.5])
