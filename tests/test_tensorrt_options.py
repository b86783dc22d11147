"""Profiles, options and the place of a TensorRT engine; and what a machine without TensorRT is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from export.convert import convert
from export.profile import shape_profile
from runtime.config import OFFICIAL_SIZES
from runtime.decoder import CHUNK_TOKENS
from runtime.errors import RequestError
from runtime.package import Manifest, read_manifest
from runtime.place import Place
from runtime.prepare import main
from runtime.provider import why_not
from runtime.tensorrt_options import check_fits, engine_folder, model_hash, tensorrt_options
from tests.tiny import tiny_config


@pytest.fixture(scope="session")
def tiny_tensorrt(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` as a package for TensorRT: read only."""
    return convert(tiny_checkpoint, tmp_path_factory.mktemp("packages") / "tiny", device="tensorrt").package


@pytest.fixture
def manifest(tiny_tensorrt: Path) -> Manifest:
    return read_manifest(tiny_tensorrt)


@pytest.mark.parametrize("config", [tiny_config(), OFFICIAL_SIZES["774M"], replace(tiny_config(), n_ctx=1)])
def test_a_profile_serves_every_run_and_its_mask_is_as_long_as_all_tokens(config: object) -> None:
    profile = shape_profile(config)  # type: ignore[arg-type]
    n_ctx = config.n_ctx  # type: ignore[attr-defined]
    for shapes in profile.values():
        rows, new = shapes["input_ids"]
        assert shapes["attention_mask"] == (rows, shapes["past_key_values.0.key"][2] + new)
        assert shapes["position_ids"] == (rows, new)
    smallest, largest = profile["min"], profile["max"]
    assert smallest["input_ids"] == (1, 1)
    assert smallest["past_key_values.0.value"][2] == 0
    assert largest["input_ids"][1] == min(CHUNK_TOKENS, n_ctx)
    assert largest["past_key_values.0.key"][2] == n_ctx - 1
    for name, shape in profile["opt"].items():
        assert all(low <= best <= high for low, best, high in zip(smallest[name], shape, largest[name], strict=True))


def test_a_package_carries_its_profile(manifest: Manifest) -> None:
    assert manifest.profile == shape_profile(manifest.config)
    assert set(manifest.profile["max"]) == {
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")),
    }


def test_options_name_all_shapes_and_both_caches(manifest: Manifest) -> None:
    options = tensorrt_options(manifest, Path("engines"))
    assert options["trt_profile_min_shapes"].startswith("input_ids:1x1,attention_mask:1x1,position_ids:1x1,")
    assert options["trt_profile_opt_shapes"].endswith("past_key_values.1.value:1x2x32x16")
    assert options["trt_profile_max_shapes"].startswith("input_ids:8x64,attention_mask:8x127,position_ids:8x64,")
    assert (options["trt_engine_cache_path"], options["trt_timing_cache_path"]) == ("engines", "engines")
    assert "trt_int8_enable" not in options
    assert tensorrt_options(replace(manifest, precision="int8"), Path("e"))["trt_int8_enable"] == "1"
    assert all(isinstance(value, str) for value in options.values())


def test_an_engine_belongs_to_its_model_version_and_gpu(manifest: Manifest) -> None:
    machine = {"tensorrt_version": "10.13.3", "gpu": "NVIDIA H100 80GB HBM3"}
    folder = engine_folder(manifest, Path("cache"), **machine)
    assert folder.parent == Path("cache")
    assert folder.name == f"{model_hash(manifest)[:16]}-nvidia-h100-80gb-hbm3-tensorrt-10.13.3"
    weights = "onnx/model_fp16.onnx_data"
    other_weights = {**manifest.files, weights: replace(manifest.files[weights], sha256="0")}
    other_profile = {**manifest.profile, "opt": manifest.profile["min"]}
    others = [
        engine_folder(replace(manifest, files=other_weights), Path("cache"), **machine),
        engine_folder(replace(manifest, profile=other_profile), Path("cache"), **machine),
        engine_folder(manifest, Path("cache"), tensorrt_version="10.14.0", gpu=machine["gpu"]),
        engine_folder(manifest, Path("cache"), tensorrt_version="10.13.3", gpu="NVIDIA L4"),
    ]
    assert len({folder, *others}) == 5


def test_a_run_beyond_the_profile_is_refused(manifest: Manifest) -> None:
    check_fits(manifest.profile, rows=8, new_tokens=64)
    with pytest.raises(RequestError, match=r"9 rows of 1 new tokens at once: .* serves at most 8 rows and 64 tokens"):
        check_fits(manifest.profile, rows=9, new_tokens=1)
    with pytest.raises(RequestError, match="1 rows of 65 new tokens"):
        check_fits(manifest.profile, rows=1, new_tokens=65)


@pytest.mark.skipif(why_not(Place("tensorrt")) is None, reason="tells what is missing where TensorRT is")
def test_without_tensorrt_it_ends_with_one_line_and_no_folder(
    tiny_tensorrt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main([str(tiny_tensorrt), "--device", "tensorrt", "--cache-dir", str(tmp_path)])
    captured = capsys.readouterr()
    assert (status, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.startswith("error: ") and "tensorrt cannot run here: " in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_package_for_another_device_is_not_prepared(tiny_fp32: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_fp32), "--device", "tensorrt"]) == 2
    assert "was made for cpu, asked for tensorrt" in capsys.readouterr().err


def test_the_manifest_writes_shapes_as_lists(tiny_tensorrt: Path) -> None:
    values = json.loads((tiny_tensorrt / "manifest.json").read_text(encoding="utf-8"))
    assert values["profile"]["min"]["input_ids"] == [1, 1]
