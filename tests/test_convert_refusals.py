"""Conversions that are refused: one line each, and what was there is left standing."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from export.checkpoint import read_checkpoint
from export.convert import convert, main
from runtime.package import open_package
from tests.convert_command import assert_one_line, names, run_main
from tests.tiny import tiny_config, tiny_weights, write_safetensors_checkpoint
from tests.write_tensorbundle import write_openai_checkpoint

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "nonsense: no checkpoint folder; looked at nonsense and models/nonsense; models holds demo"),
        (
            ["demo", "--device", "cuda", "--precision", "fp32"],
            "no fp32 packages are made for cuda, expected one of",
        ),
        (
            ["demo", "--device", "tensorrt", "--precision", "int4"],
            "no int4 packages are made for tensorrt",
        ),
        (["demo", "--precision", "fp16"], "no fp16 packages are made for cpu, expected one of int8, fp32, int4"),
        (
            ["demo", "--device", "cuda", "--kv-cache", "int8"],
            "keys and values cannot be int8 on cuda",
        ),
        (["demo", "--kv-cache", "float16"], "keys and values cannot be float16 on cpu, expected float32 or int8"),
        (
            ["demo", "--exporter", "optimum", "--device", "cuda"],
            "a graph of another exporter is made into",
        ),
        (["export"], "export is no checkpoint that can be read"),
    ],
)
def test_what_cannot_be_converted_is_told_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(REPOSITORY)
    status, out, err = run_main(capsys, *arguments, "--output", tmp_path / "x")
    assert (status, out) == (2, "")
    assert_one_line(err, message)
    assert names(tmp_path) == []


@pytest.mark.parametrize("arguments", [[], ["demo", "--precision", "int3"], ["demo", "--device", "abacus"]])
def test_bad_usage_is_told_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.endswith("; see python -m export.convert --help\n")


def test_a_package_is_kept_without_force_and_replaced_with_it(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: list[str | Path] = [tiny_checkpoint, "--precision", "fp32", "--output", tmp_path / "x"]
    assert run_main(capsys, *arguments)[0] == 0
    (tmp_path / "x" / "manifest.json").rename(tmp_path / "kept.json")
    (tmp_path / "x" / "manifest.json").write_text((tmp_path / "kept.json").read_text() + "\n")
    status, out, err = run_main(capsys, *arguments)
    assert (status, out) == (2, "")
    assert_one_line(err, "x exists and was kept; replace it with --force")
    assert (tmp_path / "x" / "manifest.json").read_text().endswith("}\n\n")
    assert run_main(capsys, *arguments, "--force")[0] == 0
    assert not (tmp_path / "x" / "manifest.json").read_text().endswith("}\n\n")
    assert names(tmp_path) == ["kept.json", "x"]


def test_a_checkpoint_is_never_replaced_by_its_package(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    write_safetensors_checkpoint(folder, tiny_config(), tiny_weights(tiny_config()))
    before = names(folder)
    status, _, err = run_main(capsys, tiny_checkpoint, "--output", folder, "--force")
    assert status == 2
    assert_one_line(err, "tiny is no package and was kept, --force or not")
    assert names(folder) == before


def flip(path: Path, *, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def poison(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-4] + np.float32(np.nan).tobytes())


@pytest.mark.parametrize(
    ("layout", "damage", "message"),
    [
        ("openai", partial(flip, at=0.5), "model/h1/mlp/c_fc/w is damaged: checksum 0x"),
        ("openai", partial(flip, at=0.999), "model/wte is damaged: checksum 0x"),
        ("openai", cut, "model/wte ends at byte "),
        ("safetensors", cut, "model.safetensors"),
        ("safetensors", poison, " holds NaN or Inf, first at ["),
    ],
)
def test_a_damaged_checkpoint_leaves_the_old_package(  # noqa: PLR0917
    layout: str,
    damage: Callable[[Path], None],
    message: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, folder, package = read_checkpoint(tiny_checkpoint), tmp_path / "checkpoint", tmp_path / "packages" / "x"
    write = write_openai_checkpoint if layout == "openai" else write_safetensors_checkpoint
    write(folder, checkpoint.config, dict(checkpoint.tensors), tokenizer_dir=tiny_checkpoint)
    convert(folder, package, precision="fp32")
    before = (package / "manifest.json").read_bytes()
    damage(next(path for path in folder.iterdir() if ".data-" in path.name or path.suffix == ".safetensors"))
    status, out, err = run_main(capsys, folder, "--precision", "fp32", "--output", package, "--force")
    assert (status, out) == (2, "")
    assert_one_line(err, str(folder), message)
    assert (package / "manifest.json").read_bytes() == before
    open_package(package, full=True)
    assert names(package.parent) == ["x"]


def test_heads_that_onnxruntime_refuses_are_refused_in_one_line(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(read_checkpoint(tiny_checkpoint).config, n_head=8)
    folder = write_safetensors_checkpoint(
        tmp_path / "checkpoint", config, tiny_weights(config), tokenizer_dir=tiny_checkpoint
    )
    status, _, err = run_main(capsys, folder, "--output", tmp_path / "x")
    assert status == 2
    assert_one_line(err, "n_embd / n_head = 32 / 8 = 4 numbers are not supported, expected a multiple of 8")
    assert names(tmp_path) == ["checkpoint"]
