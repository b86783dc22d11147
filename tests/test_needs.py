"""What a package needs of the machine: refused where it is not there, and nothing else."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from runtime import needs as needs_module
from runtime.errors import DeviceError, MachineError
from runtime.needs import check_needs
from runtime.package import Needs
from runtime.processor import processor_features
from runtime.text_generator import TextGenerator
from runtime.wheel import load_onnxruntime


def test_a_processor_without_any_needed_feature_is_refused() -> None:
    if processor_features() is None:
        pytest.skip("this system does not tell what its processor has")
    needs = Needs(onnxruntime="1.32.0", processor=("made_up", "dreamt_of"))
    with pytest.raises(DeviceError) as caught:
        check_needs(needs, device="cpu")
    assert "one of made_up, dreamt_of" in str(caught.value)
    assert platform.machine() in str(caught.value)
    assert "convert with --precision fp32" in str(caught.value)


def test_one_of_the_needed_features_is_enough() -> None:
    features = processor_features()
    if features is None:
        pytest.skip("this system does not tell what its processor has")
    check_needs(Needs(onnxruntime="1.32.0", processor=("made_up", min(features))), device="cpu")


def test_an_onnxruntime_that_is_too_old_is_refused_with_both_versions() -> None:
    installed = load_onnxruntime().__version__
    with pytest.raises(DeviceError, match=rf"needs onnxruntime 99\.0\.1 or newer, installed is {installed}; update it"):
        check_needs(Needs(onnxruntime="99.0.1"), device="cpu")


def test_versions_are_compared_as_numbers() -> None:
    check_needs(Needs(onnxruntime="1.3.0"), device="cpu")  # as text, 1.3 would come after 1.23


def test_a_package_that_needs_nothing_runs_on_any_processor() -> None:
    check_needs(Needs(onnxruntime="1.32.0"), device="cpu")


def test_what_a_gpu_package_needs_is_another_wheel() -> None:
    with pytest.raises(DeviceError, match="pip install --upgrade onnxruntime-gpu"):
        check_needs(Needs(onnxruntime="99.0.1"), device="cuda")


def test_weights_beyond_the_memory_of_a_container_are_refused(tiny_fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (tiny_fp32 / "onnx" / "model.onnx_data").stat().st_size
    monkeypatch.setattr(needs_module, "memory_limit_bytes", lambda: weights - 1)
    with pytest.raises(MachineError, match=r"may use 0\.00 GB; give it more memory, or convert to fewer bits"):
        TextGenerator.load(tiny_fp32)
    monkeypatch.setattr(needs_module, "memory_limit_bytes", lambda: weights)
    TextGenerator.load(tiny_fp32)
