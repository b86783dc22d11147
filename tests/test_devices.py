"""Devices that are not here: told in one line, under either wheel of onnxruntime, and never replaced by the CPU."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.devices import main
from runtime.errors import RequestError
from runtime.receipt import Receipt
from runtime.text_generator import TextGenerator
from runtime.wheel import load_onnxruntime

from .gpu_wheel import made_for, python_of, run

Copy = Callable[[Path], Path]
Capture = pytest.CaptureFixture[str]

FALLBACK = """
import sys
import onnxruntime

options = onnxruntime.SessionOptions()
options.log_severity_level = 4
print(onnxruntime.InferenceSession(sys.argv[1], options, providers=["CUDAExecutionProvider"]).get_providers())
"""
"""What an application does that trusts onnxruntime."""


NEEDED = {
    "cuda": (["libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudart.so.13"], "[cuda,cudnn]==1.31.1"),
    "tensorrt": (["libnvinfer.so.10", "libnvonnxparser.so.10", "libcudnn.so.9"], "'tensorrt-cu13<11'"),
}
"""Libraries that a provider of onnxruntime-gpu 1.31.1 needs, beside others, and what to install them with."""


@pytest.fixture(scope="session")
def gpu_python() -> Path:
    return python_of(".venv-gpu")


def loads(library: str) -> bool:
    """Whether the system's loader finds a library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The line that a command failed with."""
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# The CPU's wheel


@pytest.mark.parametrize("device", ["cuda", "tensorrt", "cuda:1"])
@pytest.mark.parametrize("command", ["generate", "verify"])
def test_the_cpus_wheel_is_named_as_the_cause(tiny_fp32: Path, copied: Copy, device: str, command: str) -> None:
    package = made_for(copied(tiny_fp32), device.partition(":")[0])
    line = one_line(run(sys.executable, "-m", f"runtime.{command}", package, "--device", device, "--json"))
    version = load_onnxruntime().__version__
    assert line.startswith(f"error: {device} cannot run here: the installed onnxruntime {version} was built without ")
    assert "pip uninstall -y onnxruntime && pip install 'gpt2-edge[gpu]'" in line


def test_a_package_for_cuda_asks_for_cuda_unless_told_otherwise(tiny_fp32: Path, copied: Copy) -> None:
    assert "cuda cannot run here" in one_line(
        run(sys.executable, "-m", "runtime.generate", made_for(copied(tiny_fp32), "cuda"), "Once")
    )


def test_weights_are_not_prepacked_for_a_gpu(tiny_fp32: Path, copied: Copy, tmp_path: Path) -> None:
    package = made_for(copied(tiny_fp32), "cuda")
    with pytest.raises(RequestError, match="weights are prepacked for a processor, and cuda is none"):
        TextGenerator.load(package, prepacked_dir=tmp_path / "prepacked")
    assert not (tmp_path / "prepacked").exists()


def test_what_this_machine_can_do_is_told(capsys: Capture) -> None:
    assert main(["--json"]) == 0
    devices = json.loads(capsys.readouterr().out)["devices"]
    assert {name: device["runs"] for name, device in devices.items()} == {
        "cpu": True,
        "cuda": False,
        "tensorrt": False,
    }
    assert "was built without CUDAExecutionProvider" in devices["cuda"]["why_not"]


def test_people_are_told_a_device_a_line(capsys: Capture) -> None:
    assert main([]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["cpu"].startswith(f"cpu        yes: onnxruntime {load_onnxruntime().__version__}")
    assert lines["cuda"].startswith("cuda       no: cuda cannot run here")
    assert "processors" in lines


# Receipts


def test_a_receipt_says_where_every_node_runs(tiny_fp32: Path) -> None:
    receipt = TextGenerator.load(tiny_fp32).decoder.receipt
    assert (receipt.asked_for, receipt.providers, receipt.copies) == ("cpu", ("CPUExecutionProvider",), 0)
    assert receipt.nodes is not None
    assert receipt.nodes["CPUExecutionProvider"] > 20
    assert receipt.versions["onnxruntime"] == load_onnxruntime().__version__
    assert receipt.versions["cuda"] is receipt.versions["driver"] is None


def test_what_is_unknown_is_called_unknown() -> None:
    receipt = Receipt(asked_for="cpu", providers=("X",), nodes=None, copies=None, versions={"onnxruntime": "1.23.2"})
    assert str(receipt) == (
        "asked for cpu; nodes: unknown; copies between host and device: unknown; onnxruntime 1.23.2"
    )


@pytest.mark.parametrize("command", [["generate", "Once", "--max-new-tokens", "1"], ["verify"]])
def test_commands_tell_the_receipt(tiny_fp32: Path, command: list[str]) -> None:
    name, *arguments = command
    done = run(sys.executable, "-m", f"runtime.{name}", tiny_fp32, *arguments, "--json")
    expected = TextGenerator.load(tiny_fp32).decoder.receipt.to_dict()
    assert json.loads(done.stdout)["receipt"] == expected | {"providers": list(expected["providers"])}


# The wheel for GPUs, on a machine without one


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_what_is_missing_under_the_gpus_wheel_is_named(
    gpu_python: Path, tiny_fp32: Path, copied: Copy, device: str
) -> None:
    libraries, mended_by = NEEDED[device]
    missing = [name for name in [*libraries, "libcuda.so.1"] if not loads(name)]
    if len(missing) < len(libraries):
        pytest.skip(f"this machine has what {device} needs")
    line = one_line(run(gpu_python, "-m", "runtime.verify", made_for(copied(tiny_fp32), device), "--json"))
    assert line.startswith(f"error: {device} cannot run here: ")
    assert mended_by in line
    for name in [*libraries, "libcuda.so.1"]:
        assert (name in line) == (name in missing)


def test_the_cpu_runs_under_the_gpus_wheel(gpu_python: Path, tiny_fp32: Path) -> None:
    done = run(gpu_python, "-m", "runtime.generate", tiny_fp32, "Once", "--max-new-tokens", "2", "--json")
    receipt = json.loads(done.stdout)["receipt"]
    assert (receipt["providers"], receipt["versions"]["wheel"]) == (["CPUExecutionProvider"], "onnxruntime-gpu")


@pytest.mark.skipif(loads("libcuda.so.1"), reason="this machine has NVIDIA's driver")
def test_a_silent_fallback_is_caught(gpu_python: Path, tiny_fp32: Path, copied: Copy) -> None:
    """onnxruntime, asked for CUDA alone, gives the CPU and exit status 0; our runtime refuses the same graph."""
    model = tiny_fp32 / "onnx" / "model.onnx"
    trusting = run(gpu_python, "-c", FALLBACK, model)
    assert (trusting.returncode, trusting.stdout) == (0, "['CPUExecutionProvider']\n")
    ours = run(gpu_python, "-m", "runtime.generate", made_for(copied(tiny_fp32), "cuda"), "Once", "--json")
    assert "libcuda.so.1" in one_line(ours)


def test_both_wheels_at_once_are_recognised(tiny_fp32: Path, copied: Copy) -> None:
    python = python_of(".venv-both-wheels")
    line = one_line(run(python, "-m", "runtime.verify", made_for(copied(tiny_fp32), "cuda")))
    assert " and onnxruntime-gpu 1.31.1 are both installed, and overwrite each other's files; keep one: " in line
    told = json.loads(run(python, "-m", "runtime.devices", "--json").stdout)
    assert set(told["wheels"]) == {"onnxruntime", "onnxruntime-gpu"}
    assert told["devices"]["cpu"]["runs"]
    assert "are both installed" in told["warning"]
