"""Graphs that are not quite what optimum writes: another spelling of the model is adopted, anything else is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.convert import convert, main
from export.onnx_export import read_onnx_export
from runtime.errors import CheckpointError, VerificationError
from runtime.package import Precision

from .conftest import exported

Change = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="session")
def tiny_export(optimum: Any, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What optimum makes of the tiny checkpoint: read only."""
    return exported(tiny_checkpoint, tmp_path_factory)


@pytest.fixture
def altered(tiny_export: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """The tiny export with its graph changed."""

    def alter(change: Change) -> Path:
        folder = tmp_path / "export"
        shutil.copytree(tiny_export, folder)
        model = onnx.load(str(folder / "model.onnx"))
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return folder

    return alter


# Spellings of the same graph


def test_external_data_and_a_folder_onnx_give_the_same_package(tiny_export: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_export, tmp_path / "export"))
    (folder / "onnx").mkdir()
    model = onnx.load(str(folder / "model.onnx"))
    onnx.save(model, str(folder / "onnx" / "model.onnx"), save_as_external_data=True, location="weights.bin")
    (folder / "model.onnx").unlink()
    manifests = [
        convert(source, tmp_path / name, precision="fp32", origin="adopted").manifest
        for source, name in ((tiny_export, "inside"), (folder, "beside"))
    ]
    assert manifests[0].golden == manifests[1].golden
    assert manifests[0].files["onnx/model.onnx_data"] == manifests[1].files["onnx/model.onnx_data"]


def test_a_head_that_transposes_the_embedding_is_tied(altered: Callable[[Change], Path], tmp_path: Path) -> None:
    def transpose(model: onnx.ModelProto) -> None:
        head = next(node for node in model.graph.node if "logits" in node.output)
        head.input[1] = "transposed"
        model.graph.node.insert(0, helper.make_node("Transpose", ["transformer.wte.weight"], ["transposed"]))

    manifest = convert(altered(transpose), tmp_path / "x", precision="fp32", origin="adopted").manifest
    assert manifest.config.tie_word_embeddings


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_head_of_its_own_is_kept(altered: Callable[[Change], Path], tmp_path: Path, precision: Precision) -> None:
    def untie(model: onnx.ModelProto) -> None:
        head = next(node.input[1] for node in model.graph.node if "logits" in node.output)
        replace_weight(model, head, lambda values: values * np.float32(0.5))

    folder = altered(untie)
    manifest = convert(folder, tmp_path / "x", precision=precision, origin="adopted", allow_loss=True).manifest
    assert not manifest.config.tie_word_embeddings


def replace_weight(model: onnx.ModelProto, name: str, change: Callable[[Any], Any]) -> None:
    proto = next(proto for proto in model.graph.initializer if proto.name == name)
    proto.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(proto)), name))


# Refusals


def drop_positions(model: onnx.ModelProto) -> None:
    model.graph.input.remove(next(value for value in model.graph.input if value.name == "position_ids"))


def fix_the_batch(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1


def make_cache_half(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        if value.name.startswith("past"):
            value.type.tensor_type.elem_type = TensorProto.FLOAT16


def add_an_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))


def rename_a_weight(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.input[:] = ["w" if name.endswith("h.1.mlp.c_fc.weight") else name for name in node.input]
    next(proto for proto in model.graph.initializer if proto.name.endswith("h.1.mlp.c_fc.weight")).name = "w"


def poison(model: onnx.ModelProto) -> None:
    replace_weight(model, "transformer.h.0.ln_1.bias", lambda values: values * np.float32(np.nan))


def age(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 14


def call_a_stranger(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def hide_the_logits(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if "logits" in node.output).op_type = "Mul"


def climb_out(model: onnx.ModelProto) -> None:
    lay_outside(model, "../secret")


def go_to_the_root(model: onnx.ModelProto) -> None:
    lay_outside(model, "/etc/hostname")


def lay_beyond_the_end(model: onnx.ModelProto) -> None:
    lay_outside(model, "config.json")


def lay_outside(model: onnx.ModelProto, location: str) -> None:
    proto = next(proto for proto in model.graph.initializer if proto.name == "transformer.wpe.weight")
    proto.ClearField("raw_data")
    proto.data_location = TensorProto.EXTERNAL
    proto.external_data.add(key="location", value=location)


def read_a_file_in_a_constant(model: onnx.ModelProto) -> None:
    constant = next(node for node in model.graph.node if node.op_type == "Constant")
    constant.attribute[0].t.data_location = TensorProto.EXTERNAL


def nest_a_graph(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Gemm")
    node.attribute.append(helper.make_attribute("body", helper.make_graph([], "g", [], [])))


def starve_a_product(model: onnx.ModelProto) -> None:
    del next(node for node in model.graph.node if node.op_type == "Gemm").input[1:]


def break_a_line(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].name = "two\nlines"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nest_a_graph, "it has a 'Gemm' with a graph or another attribute that is no plain value"),
        (starve_a_product, "it has a 'Gemm' without inputs or outputs"),
        (break_a_line, "it has a weight whose name is not printable text"),
        (drop_positions, "input position_ids is missing; export it again with: optimum-cli"),
        (fix_the_batch, "input input_ids is INT64 [1, 'free'], expected INT64 ['free', 'free']"),
        (make_cache_half, "input past_key_values.0.key is FLOAT16 ['free', 2, 'free', 16], expected FLOAT"),
        (add_an_input, "input 'use_cache_branch' is unknown"),
        (rename_a_weight, "weight transformer.h.1.mlp.c_fc.weight is missing"),
        (poison, "h.0.ln_1.bias holds NaN or Inf"),
        (age, "it is of opset 14, expected 18 to 21"),
        (call_a_stranger, "it has operators of domain 'com.example'"),
        (hide_the_logits, "logits come from 'Mul', expected a MatMul"),
        (climb_out, "its data lie in '../secret', expected a file beside the graph"),
        (go_to_the_root, "its data lie in '/etc/hostname', expected a file beside the graph"),
        (lay_beyond_the_end, "8192 bytes at 0 of config.json, which has"),
        (read_a_file_in_a_constant, "it has a constant of 'Constant' that lies in a file"),
    ],
)
def test_a_foreign_graph_is_refused_in_one_line(
    altered: Callable[[Change], Path],
    change: Change,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = main(["--from-onnx", str(altered(change)), "--output", str(tmp_path / "x")])
    captured = capsys.readouterr()
    assert (status, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert message in captured.err
    assert not (tmp_path / "x").exists()


def test_data_behind_a_link_that_leads_out_are_refused(altered: Callable[[Change], Path], tmp_path: Path) -> None:
    folder = altered(lambda model: lay_outside(model, "weights"))
    (tmp_path / "secret").write_bytes(bytes(8192))
    (folder / "weights").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="a link that leads out of the folder"):
        dict(read_onnx_export(folder).checkpoint.tensors)


def test_what_is_no_export_is_refused(tiny_export: Path, tiny_fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a package already"):
        read_onnx_export(tiny_fp32)
    with pytest.raises(CheckpointError, match=r"looked for model.onnx and onnx/model.onnx, found no .onnx file"):
        read_onnx_export(tmp_path)
    folder = Path(shutil.copytree(tiny_export, tmp_path / "export"))
    os.truncate(folder / "model.onnx", 1000)
    with pytest.raises(CheckpointError, match="is no ONNX model"):
        read_onnx_export(folder)


# Nothing is published


def ignore_the_mask(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.input[:] = ["all_ones" if name == "attention_mask" else name for name in node.input]
    one = helper.make_tensor("value", TensorProto.INT64, [1], [1])
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["mask_shape"], ["all_ones"], value=one))
    model.graph.node.insert(0, helper.make_node("Shape", ["attention_mask"], ["mask_shape"]))


def test_a_graph_that_ignores_the_mask_is_not_published(altered: Callable[[Change], Path], tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="rows of different lengths disturb each other in this graph"):
        convert(altered(ignore_the_mask), tmp_path / "x", precision="fp32", origin="adopted")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_graph_of_another_function_is_not_published(tiny_export: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_export, tmp_path / "export"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    with pytest.raises(VerificationError, match="the fp32 graph is not the model"):
        convert(folder, tmp_path / "x", precision="fp32", origin="adopted")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
