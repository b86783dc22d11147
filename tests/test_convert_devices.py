"""Packages for CUDA and TensorRT, converted on a machine that has neither."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from export.convert import convert, main
from export.top_k_graph import MOST, write_top_k_graph
from runtime.errors import DeviceError
from runtime.package import CONFIG, FORMAT_VERSION, GENAI_CONFIG, MODEL_CARD, Device, Precision, open_package
from runtime.sampling import rank_largest
from runtime.text_generator import TextGenerator
from tests.conftest import DEMO_CHECKPOINT
from tests.test_package import rewrite_manifest
from tests.tiny import tiny_config

KL: dict[tuple[Device, Precision], float] = {
    ("cuda", "fp16"): 1e-5,
    ("cuda", "int8"): 2e-4,
    ("cuda", "int4"): 0.03,
    ("tensorrt", "fp16"): 1e-5,
    ("tensorrt", "int8"): 0.004,
}
"""Nats a token, of the demo model to its float32 weights. Measured: 1.6e-6, 6.5e-5, 0.018, 5e-7, 0.0014."""


@pytest.fixture(scope="module", params=KL, ids="-".join)
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    device, precision = request.param
    output = tmp_path_factory.mktemp("packages") / f"{precision}-{device}"
    return convert(DEMO_CHECKPOINT, output, device=device, precision=precision).package


def test_the_package_is_whole_and_close_to_its_source(demo: Path) -> None:
    manifest = open_package(demo, full=True).manifest
    assert manifest.quality["kl"] <= KL[manifest.device, manifest.precision]
    assert manifest.kv_cache == "float16"
    assert manifest.recipe["verified"].startswith("verified on onnxruntime's CPU provider, not on")
    assert "residual kept in float16" in manifest.recipe["range"]
    assert any(len(golden.greedy_ids) for golden in manifest.golden)
    assert f"not on {manifest.device}" in (demo / MODEL_CARD).read_text(encoding="utf-8")


def test_weights_are_stored_once_and_padded_to_whole_kernels(demo: Path) -> None:
    package = open_package(demo)
    manifest, config = package.manifest, package.manifest.config
    graph = onnx.load(package.model_path, load_external_data=False).graph
    shapes = {proto.name: tuple(proto.dims) for proto in graph.initializer}
    assert shapes["wte.weight"][0] == config.n_vocab + 64  # 8,192 rows, their mean, and 63 of padding
    bits = {"fp16": 16, "int8": 8, "int4": 4}[manifest.precision]
    matrices = config.n_layer * 12 * config.n_embd**2
    table = shapes["wte.weight"][0] * config.n_embd
    stored = manifest.files[f"{package.model_path.relative_to(demo).as_posix()}_data"].bytes
    ideal = matrices * bits // 8 + (table * 2 if manifest.device == "tensorrt" else table * bits // 8)
    assert ideal < stored < 1.25 * ideal + 2 * config.n_ctx * config.n_embd + 4096 * len(shapes)


def test_other_clients_are_told_the_device(demo: Path) -> None:
    manifest = open_package(demo).manifest
    genai = json.loads((demo / GENAI_CONFIG).read_text(encoding="utf-8"))
    provider = {"cuda": "cuda", "tensorrt": "NvTensorRtRtx"}[manifest.device]
    assert genai["model"]["decoder"]["session_options"] == {"provider_options": [{provider: {}}]}
    assert genai["search"]["past_present_share_buffer"] == (manifest.device == "cuda")
    section = json.loads((demo / CONFIG).read_text(encoding="utf-8"))["transformers.js_config"]
    assert set(section["kv_cache_dtype"].values()) == {"float16"}


def test_a_package_for_another_device_does_not_load_as_one_for_the_cpu(demo: Path) -> None:
    device = open_package(demo).manifest.device
    with pytest.raises(DeviceError, match=f"was made for {device}, asked for cpu"):
        TextGenerator.load(demo, device="cpu")


def test_the_command_makes_fp16_for_cuda_and_says_where_it_was_measured(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(tiny_checkpoint), "--device", "cuda"]) == 0
    assert open_package(tmp_path / "packages" / "tiny-fp16-cuda").manifest.precision == "fp16"
    assert "python -m runtime.verify packages/tiny-fp16-cuda --device cuda" in capsys.readouterr().out


def test_a_package_of_the_version_before_still_opens(tiny_fp32: Path, copied: Callable[[Path], Path]) -> None:
    package = copied(tiny_fp32)

    def as_before(values: dict[str, object]) -> None:
        values["format_version"] = FORMAT_VERSION - 1
        del values["profile"]

    rewrite_manifest(package, as_before)
    assert open_package(package).manifest == open_package(tiny_fp32).manifest


# The largest logits, picked on the device


@pytest.fixture(scope="module")
def top_k(tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    path = tmp_path_factory.mktemp("top_k") / "top_k.onnx"
    write_top_k_graph(path, tiny_config())
    onnx.checker.check_model(path, full_check=True)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_the_picked_logits_are_those_that_sampling_ranks_first(top_k: onnxruntime.InferenceSession) -> None:
    rng = np.random.default_rng(0)
    logits: NDArray[np.float32] = rng.standard_normal((3, 1, tiny_config().n_vocab), dtype=np.float32)
    logits[1] = np.round(logits[1])  # many ties
    logits[2] = -40  # nothing but ties
    values, ids = top_k.run(None, {"logits": logits})
    for row in range(3):
        expected = rank_largest(logits[row, 0], MOST)
        np.testing.assert_array_equal(values[row], logits[row, 0][expected])
        np.testing.assert_array_equal(logits[row, 0][ids[row]], values[row])
