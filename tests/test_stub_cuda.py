"""Where nodes go on CUDA, by the real onnxruntime-gpu on CUDA libraries that do nothing: see stub_cuda/README.md.

No GPU and no result: what is shown is placement, copies, and what is refused.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from export.convert import convert
from runtime.package import Precision

from .gpu_wheel import ROOT, made_for, python_of, run
from .stub_cuda.build import build_stub

Run = Callable[..., "subprocess.CompletedProcess[str]"]

OPEN = """
import json, sys
from pathlib import Path
from runtime.errors import GPT2EdgeError
from runtime.place import Place
from runtime.session import open_session

try:
    print(json.dumps(open_session(Path(sys.argv[1]), place=Place("cuda")).receipt.to_dict()))
except GPT2EdgeError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""

WHY_NOT = """
from runtime.place import Place
from runtime.provider import why_not

print(why_not(Place("cuda")))
"""

WIDTH, HEADS = 128, 2


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter that has onnxruntime-gpu."""
    return python_of(".venv-gpu")


@pytest.fixture(scope="module")
def stub(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of CUDA libraries that do nothing."""
    if not shutil.which("gcc") or not shutil.which("nm"):
        pytest.skip("no gcc and nm here to make CUDA libraries that do nothing")
    folder = tmp_path_factory.mktemp("stub-cuda")
    (capi,) = (python.parent.parent / "lib").glob("python*/site-packages/onnxruntime/capi")
    build_stub(capi, folder)
    return folder


@pytest.fixture(scope="module")
def run_on_stub(python: Path, stub: Path) -> Run:
    """Run that interpreter where these libraries are what the system has."""

    def on_stub(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return run(python, *arguments, LD_LIBRARY_PATH=str(stub), **environment)

    return on_stub


def attention_graph(path: Path, dtype: int) -> Path:
    """A product and GroupQueryAttention, whose total length comes from the shape of the mask."""
    value, node = helper.make_tensor_value_info, helper.make_node
    cache_shape = ["B", HEADS, "M", WIDTH // HEADS]
    attention_inputs = ["qkv", "", "", "keys", "values", "seqlens_k", "total_int32"]
    graph = helper.make_graph(
        [
            node("MatMul", ["x", "weight"], ["qkv"], "product"),
            node("Shape", ["mask"], ["shape"], "mask_shape"),
            node("Gather", ["shape", "one"], ["total"], "mask_length"),
            node("Cast", ["total"], ["total_int32"], "mask_length_int32", to=TensorProto.INT32),
            node(
                "GroupQueryAttention",
                attention_inputs,
                ["y", "new_keys", "new_values"],
                "attention",
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=HEADS,
            ),
        ],
        "attention",
        [
            value("x", dtype, ["B", "S", WIDTH]),
            value("mask", TensorProto.INT64, ["B", "T"]),
            value("seqlens_k", TensorProto.INT32, ["B"]),
            *(value(name, dtype, cache_shape) for name in ("keys", "values")),
        ],
        [
            value("y", dtype, ["B", "S", WIDTH]),
            *(value(name, dtype, cache_shape) for name in ("new_keys", "new_values")),
        ],
        [
            numpy_helper.from_array(np.array(1, np.int64), "one"),
            numpy_helper.from_array(np.ones((WIDTH, 3 * WIDTH), helper.tensor_dtype_to_np_dtype(dtype)), "weight"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_all_nodes_of_a_float16_graph_are_on_cuda_but_the_masks_length(run_on_stub: Run, tmp_path: Path) -> None:
    done = run_on_stub("-c", OPEN, attention_graph(tmp_path / "half.onnx", TensorProto.FLOAT16))
    assert done.stderr == ""
    receipt: dict[str, Any] = json.loads(done.stdout)
    assert receipt["asked_for"] == "cuda"
    assert set(receipt["providers"]) == {"CUDAExecutionProvider", "CPUExecutionProvider"}
    assert receipt["nodes"] == {"CUDAExecutionProvider": 3, "CPUExecutionProvider": 2}  # Gather and Cast
    assert receipt["copies"] == 0
    assert receipt["versions"]["cuda"] == "13.0"
    assert receipt["versions"]["driver"].endswith("CUDA 13.0")


def test_a_node_that_cuda_lacks_is_refused_by_name(run_on_stub: Run, tmp_path: Path) -> None:
    """CUDA has no float32 GroupQueryAttention: onnxruntime gives it to the CPU and says nothing."""
    done = run_on_stub("-c", OPEN, attention_graph(tmp_path / "single.onnx", TensorProto.FLOAT))
    assert done.returncode == 1
    assert done.stderr.startswith(
        "DeviceError: asked for cuda, but of 5 nodes 1 GroupQueryAttention (attention) would "
    )
    assert " copies between host and device in every run" in done.stderr


def test_a_package_of_the_cpus_operators_is_refused(
    run_on_stub: Run, tiny_int8: Path, copied: Callable[[Path], Path]
) -> None:
    done = run_on_stub("-m", "runtime.verify", made_for(copied(tiny_int8), "cuda"), "--json")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert " 8 MatMulIntegerToFloat (h.0.attn.c_attn" in done.stderr
    assert "convert the checkpoint with --device cuda" in done.stderr


@pytest.mark.parametrize("options", [["--greedy"], ["--top-k", "0"], ["--repetition-penalty", "1.2"]])
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_a_package_for_cuda_is_opened_captured_and_decoded_there(
    run_on_stub: Run, tiny_checkpoint: Path, tmp_path: Path, precision: Precision, options: list[str]
) -> None:
    """Kernels that do nothing leave logits of 0, so what is written means nothing; that it is, shows the wiring."""
    package = convert(tiny_checkpoint, tmp_path / "package", precision=precision, device="cuda").package
    done = run_on_stub("-m", "runtime.generate", package, "a", "--max-new-tokens", "5", "--json", *options)
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["receipt"]["providers"][0] == "CUDAExecutionProvider"
    assert result["receipt"]["copies"] == 0
    assert len(result["samples"][0]["ids"]) == 5 or result["samples"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"STUB_DRIVER_CUDA": "12040"}, "CUDA 12.4 is too old for onnxruntime's CUDA 13.0; install a newer driver"),
        ({"STUB_INIT_STATUS": "803"}, "does not start (CUDA_ERROR_SYSTEM_DRIVER_MISMATCH); see what nvidia-smi says"),
        ({"STUB_INIT_STATUS": "100", "STUB_GPUS": "0"}, "there is no GPU 1: the driver shows 0 (CUDA_VISIBLE_DEVICES"),
        ({"STUB_GPUS": "1"}, "there is no GPU 1: the driver shows 1"),
    ],
)
def test_what_is_wrong_with_a_driver_is_told(
    run_on_stub: Run,
    tiny_fp32: Path,
    copied: Callable[[Path], Path],
    environment: dict[str, str],
    message: str,
) -> None:
    package = made_for(copied(tiny_fp32), "cuda")
    done = run_on_stub("-m", "runtime.generate", package, "Once", "--device", "cuda:1", **environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr


def test_a_device_that_computes_nonsense_is_not_called_able(run_on_stub: Run) -> None:
    told = json.loads(run_on_stub("-m", "runtime.devices", "--json").stdout)
    assert told["gpus"] == [{"name": "stub", "memory_bytes": 80 << 30, "compute_capability": "9.0"}]
    assert not told["devices"]["cuda"]["runs"]
    assert "cuda computes wrongly: 3 squared is " in told["devices"]["cuda"]["why_not"]


@pytest.mark.parametrize(
    "folders",
    [
        {"libcublas": "nvidia/cu13/lib", "libcudart": "nvidia/cu13/lib"},  # of CUDA 13's wheels
        {"libcublas": "nvidia/cublas/lib", "libcudart": "nvidia/cuda_runtime/lib"},  # of CUDA 12's
    ],
)
def test_libraries_that_pip_installed_are_found(
    python: Path, stub: Path, tmp_path: Path, folders: dict[str, str]
) -> None:
    for library in stub.glob("lib*.so.*[0-9]"):
        folder = tmp_path / folders.get(library.name.partition("Lt")[0].partition(".")[0], "nvidia/other/lib")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, folder)
    done = run(python, "-c", WHY_NOT, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert (done.stdout, done.stderr) == ("None\n", "")
