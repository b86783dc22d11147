"""python -m runtime.info and python -m export.info: what a package or a checkpoint is, told without loading it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import export.info
import runtime.info
from export.package_size import conversion_peak_bytes, package_bytes, weights_bytes
from export.target import PRECISIONS
from runtime import needs as needs_module
from runtime.config import OFFICIAL_SIZES
from runtime.package import (
    FORMAT_VERSION,
    GENERATION_CONFIG,
    MODEL_FILES,
    TOKENIZER,
    WEIGHTS_SUFFIX,
    Needs,
    Precision,
    read_manifest,
    write_manifest,
)
from runtime.wheel import load_onnxruntime

from .conftest import DEMO_CHECKPOINT, bytes_checkpoint, converted
from .test_isolation import WORKSHOP, run_without
from .tiny import tiny_config, tiny_weights, write_safetensors_checkpoint

Copy = Callable[[Path], Path]
Capture = pytest.CaptureFixture[str]

ROOT = Path(__file__).parent.parent
WEIGHTS = tiny_weights(tiny_config())


def told(capsys: Capture) -> dict[str, Any]:
    """The one JSON object that was printed."""
    report = json.loads(capsys.readouterr().out)
    assert isinstance(report, dict)
    return report


def altered_needs(package: Path, needs: Needs) -> Path:
    write_manifest(package, replace(read_manifest(package), needs=needs))
    return package


# Packages


def test_a_package_is_described_from_its_manifest(demo_int8: Path, capsys: Capture) -> None:
    assert runtime.info.main([str(demo_int8), "--json"]) == 0
    report, manifest = told(capsys), read_manifest(demo_int8)
    assert (report["package"], report["whole"]) == (str(demo_int8), True)
    assert (report["name"], report["precision"], report["device"], report["format_version"]) == (
        "demo",
        "int8",
        "cpu",
        FORMAT_VERSION,
    )
    assert (report["parameters"], report["config"]) == (6_967_296, manifest.config.to_dict())
    assert report["cache_bytes_in_full"] == 512 * report["cache_bytes_per_token"] == 512 * 2 * 6 * 256 * 4
    assert report["source"]["fingerprint"] == manifest.source.fingerprint
    assert (report["quality"], report["tools"]) == (manifest.quality, manifest.tools)
    assert report["golden_prompts"] == 3


def test_sizes_are_those_of_the_files(demo_int8: Path, capsys: Capture) -> None:
    runtime.info.main([str(demo_int8), "--json"])
    report = told(capsys)
    files = [path for path in demo_int8.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert report["bytes"] == sum(path.stat().st_size for path in files)
    assert report["weights_bytes"] == (demo_int8 / (MODEL_FILES["int8"] + WEIGHTS_SUFFIX)).stat().st_size


def test_on_a_terminal_every_fact_is_a_line(demo_int8: Path, capsys: Capture) -> None:
    assert runtime.info.main([str(demo_int8)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 24  # rows of the smallest usual terminal
    for fact in ("whole yes", "parameters 6,967,296", "unmet needs none", "golden prompts 3"):
        assert fact in [" ".join(line.split()) for line in lines]


def test_run_as_a_module_it_loads_no_library_and_warns_of_nothing(demo_int8: Path) -> None:
    result = run_without([*WORKSHOP, "tokenizers"], "runtime.info", str(demo_int8), "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["whole"] is True
    loaded = "import sys; from runtime.info import main; main(sys.argv[1:]); print('onnxruntime' in sys.modules)"
    command = [sys.executable, "-c", loaded, str(demo_int8)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_this_machine_is_told_beside_the_needs(demo_int8: Path, capsys: Capture) -> None:
    runtime.info.main([str(demo_int8), "--json"])
    report = told(capsys)
    assert report["needs"]["onnxruntime"] == read_manifest(demo_int8).needs.onnxruntime
    assert report["machine"]["onnxruntime"] == load_onnxruntime().__version__
    assert report["unmet_needs"] == []


def test_needs_that_are_not_met_are_all_told_and_not_refused(
    tiny_int8: Path, copied: Copy, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs_module, "processor_features", lambda: frozenset({"sse2"}))
    package = altered_needs(copied(tiny_int8), Needs(onnxruntime="99.0.1", processor=("made_up",)))
    assert runtime.info.main([str(package), "--json"]) == 0
    old, lacking = told(capsys)["unmet_needs"]
    assert "needs onnxruntime 99.0.1 or newer" in old
    assert "needs a processor with one of made_up" in lacking


def test_what_cannot_be_told_is_unknown(tiny_int8: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.info, "installed_wheels", dict)
    monkeypatch.setattr(runtime.info, "processor_features", lambda: None)
    monkeypatch.setattr(needs_module, "processor_features", lambda: None)
    assert runtime.info.main([str(tiny_int8)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "machine onnxruntime unknown, processor_with unknown, activation_bits 7 unmet needs none" in out


def test_a_damaged_package_is_described_and_the_damage_told(tiny_int8: Path, copied: Copy, capsys: Capture) -> None:
    package = copied(tiny_int8)
    (package / GENERATION_CONFIG).write_text("{}")
    (package / TOKENIZER).unlink()
    assert runtime.info.main([str(package), "--json"]) == 2
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (report["whole"], report["precision"]) == (False, "int8")
    assert f"{GENERATION_CONFIG} has 2 bytes" in printed.err
    assert f"{TOKENIZER} is missing" in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("command", [runtime.info.main, export.info.main])
def test_a_manifest_that_was_altered_is_one_line(
    tiny_int8: Path, copied: Copy, capsys: Capture, command: Callable[[list[str]], int]
) -> None:
    manifest = copied(tiny_int8) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"int8"', '"fp32"'))
    assert command([str(manifest.parent)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "manifest.json was altered" in printed.err
    assert printed.err.count("\n") == 1


def test_export_info_tells_the_same_of_a_package(tiny_int8: Path, capsys: Capture) -> None:
    runtime.info.main([str(tiny_int8), "--json"])
    expected = told(capsys)
    assert export.info.main([str(tiny_int8), "--json"]) == 0
    assert told(capsys) == expected


# Checkpoints


def test_a_checkpoint_is_described_by_name(capsys: Capture) -> None:
    assert export.info.main(["demo", "--models-dir", str(DEMO_CHECKPOINT.parent), "--json"]) == 0
    report = told(capsys)
    assert (report["checkpoint"], report["layout"]) == (str(DEMO_CHECKPOINT), "safetensors")
    assert (report["parameters"], report["tensors"], report["dtypes"]) == (6_967_296, 76, {"F16": 76})
    assert report["weights_bytes"] == (DEMO_CHECKPOINT / "model.safetensors").stat().st_size
    assert report["tokenizer"]["tokens"] == 8192


def test_run_as_a_module_it_warns_of_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "export.info", str(DEMO_CHECKPOINT)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "package bytes" in done.stdout


def test_shards_and_dtypes_are_counted(tmp_path: Path, capsys: Capture) -> None:
    weights = {name: values.astype(np.float16) if "mlp" in name else values for name, values in WEIGHTS.items()}
    folder = write_safetensors_checkpoint(
        tmp_path, tiny_config(), weights, shards=3, tokenizer_dir=bytes_checkpoint(tmp_path / "bytes", n_vocab=257)
    )
    assert export.info.main([str(folder), "--json"]) == 2  # 257 tokens are too many
    report = told(capsys)
    assert (report["layout"], report["dtypes"]) == ("safetensors-sharded", {"F32": 20, "F16": 8})
    assert report["weights_bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_a_checkpoint_without_a_tokenizer_is_described_and_the_fault_told(tmp_path: Path, capsys: Capture) -> None:
    folder = write_safetensors_checkpoint(tmp_path / "x", tiny_config(), WEIGHTS)
    assert export.info.main([str(folder), "--json"]) == 2
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["tensors"] == len(WEIGHTS)
    assert "package_bytes" not in report
    assert "no tokenizer; looked for" in printed.err
    assert printed.err.count("\n") == 1


def test_heads_that_no_graph_takes_are_told(tmp_path: Path, capsys: Capture) -> None:
    config = replace(tiny_config(), n_head=8)
    folder = write_safetensors_checkpoint(tmp_path / "x", config, tiny_weights(config))
    assert export.info.main([str(folder)]) == 2
    printed = capsys.readouterr()
    assert "n_head 8" in printed.out
    assert "are not supported, expected a multiple of 8" in printed.err


def test_a_checkpoint_with_faults_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    damaged = {name: values for name, values in WEIGHTS.items() if name not in ("ln_f.bias", "wpe.weight")}
    folder = write_safetensors_checkpoint(tmp_path / "x", tiny_config(), damaged)
    assert export.info.main([str(folder), "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "2 faults in its tensors: transformer.wpe.weight is missing; transformer.ln_f.bias is missing" in printed.err


# What a checkpoint would become


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("demo_fp32", 0.01),
        ("demo_int8", 0.01),
        ("demo_int4", 0.01),
        ("tiny_fp32", 0.05),
        ("tiny_int8", 0.05),
        ("tiny_int4", 0.05),
    ],
)
def test_the_size_of_a_package_is_known_before_it_is_made(
    request: pytest.FixtureRequest, name: str, tolerance: float
) -> None:
    """A package of 100 kB is a tenth small files, which are estimated."""
    manifest = read_manifest(request.getfixturevalue(name))
    weights = manifest.files[MODEL_FILES[manifest.precision] + WEIGHTS_SUFFIX].bytes
    assert weights_bytes(manifest.config, manifest.precision) == weights
    total = sum(entry.bytes for entry in manifest.files.values())
    estimate = package_bytes(manifest.config, manifest.precision, tokenizer_bytes=manifest.files[TOKENIZER].bytes)
    assert estimate == pytest.approx(total, rel=tolerance)


@pytest.mark.parametrize("precision", PRECISIONS["cpu"])
def test_a_head_of_its_own_and_odd_widths_are_counted_to_the_byte(tmp_path: Path, precision: Precision) -> None:
    config = replace(tiny_config(), n_embd=272, n_inner=300, n_vocab=263, eos_token_id=256, tie_word_embeddings=False)
    folder = bytes_checkpoint(tmp_path / "x", n_vocab=257)  # for its tokenizer
    write_safetensors_checkpoint(folder, config, tiny_weights(config))
    manifest = read_manifest(converted(folder, tmp_path, precision))
    assert weights_bytes(config, precision) == manifest.files[MODEL_FILES[precision] + WEIGHTS_SUFFIX].bytes


def test_the_largest_model_fits_a_small_machine() -> None:
    """Measured for 1558M, int8: 1,576,324,142 bytes, at a peak of 2.27 GB."""
    config = OFFICIAL_SIZES["1558M"]
    size = package_bytes(config, "int8", tokenizer_bytes=1_555_369)
    assert size == pytest.approx(1_576_324_142, rel=0.001)
    assert conversion_peak_bytes(config, size) == pytest.approx(2.27e9, rel=0.1)
