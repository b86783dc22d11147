"""python -m export.tune: what is tried, which package is kept, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.tune import main
from runtime.package import read_manifest
from runtime.text_generator import TextGenerator

Capture = pytest.CaptureFixture[str]

TEXT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 3
SHORT = ("--prompt-tokens", 8, "--new-tokens", 4)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def refused(capsys: Capture, *arguments: object, status: int = 2) -> str:
    """The last line of a command that ends with a status."""
    try:
        got = main([str(argument) for argument in arguments])
    except SystemExit as usage:
        got = int(usage.code or 0)
    err = capsys.readouterr().err
    assert (got, err.count("\n")) == (status, 1)
    return err


def test_the_smallest_that_keeps_the_limits_is_written(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "packages" / "tuned"
    arguments = [tiny_checkpoint, "--text", text, "--prefer", "size", "--bar", "kl=10", *SHORT, "--output", output]
    assert main([str(argument) for argument in [*arguments, "--json"]]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    rows = {row["package"]: row for row in result["rows"]}
    assert printed.err == ""
    assert list(rows) == ["fp32", "int8", "int8-kv8", "int4", "int4-kv8"]
    smallest = min(rows.values(), key=lambda row: row["bytes"])
    assert result["chosen"] == smallest["package"]
    assert smallest["on_frontier"]
    assert rows["fp32"]["kl"] == 0
    assert 0 < rows["int8"]["kl"] < rows["int4"]["kl"]
    assert all(row["ms_per_token"] > 0 and row["ttft_ms"] > 0 and row["missed"] == [] for row in rows.values())

    assert [path.name for path in output.parent.iterdir()] == ["tuned"]  # the others are gone
    manifest = read_manifest(output)
    precision, _, cache = smallest["package"].partition("-")
    assert (manifest.precision, manifest.kv_cache) == (precision, "int8" if cache else "float32")
    assert sum(entry.bytes for entry in manifest.files.values()) == smallest["bytes"]
    TextGenerator.load(output)


def test_quality_chooses_what_is_nearest_to_fp32(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    output, picture = tmp_path / "tuned", tmp_path / "tuned.svg"
    limits = ["--bar", "kl=0.01,top1=0.5"]
    arguments = [tiny_checkpoint, "--text", text, "--try", "int4,fp32", "--prefer", "quality", *limits, *SHORT]
    assert main([str(argument) for argument in [*arguments, "--output", output, "--plot", picture]]) == 0
    out = capsys.readouterr().out
    assert f"{output}: fp32, the best in quality of those that keep the limits" in out
    assert read_manifest(output).precision == "fp32"
    assert picture.read_text(encoding="utf-8").startswith("<?xml")


def test_where_none_keeps_the_limits_none_is_written(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "packages"
    arguments = ["--text", text, "--try", "int8", "--slo", "disk_bytes=1", *SHORT, "--output", folder / "tuned"]
    assert main([str(argument) for argument in [tiny_checkpoint, *arguments]]) == 3
    printed = capsys.readouterr()
    assert "missed: disk_bytes is " in printed.out
    assert printed.err.splitlines()[-1].endswith("no package keeps the limits, and none was written; move a limit")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--try", "int8,int5"), "no recipe int5, expected some of fp32, int8, int8-kv8, int4, int4-kv8"),
        (("--bar", "accuracy=0.5"), "accuracy is not measured by this run"),
        (("--slo", "speed=1"), "no figure 'speed'"),
        (("--slo", "load_ms=100"), "--slo load_ms: loads are not timed here"),
        (
            ("--tokens", "100000", "--prompt-tokens", "8", "--new-tokens", "4"),
            "tokens, expected at least 100,000; give a longer text",
        ),
        (("--prompt-tokens", "60", "--new-tokens", "60"), "do not fit the model's context of"),
        (("--new-tokens", "1"), "'1', expected a whole number, 2 or more"),
        (("--plot", "x.gif"), "expected a file name that ends with .svg or .png"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    arguments: tuple[str, ...], told: str, tiny_checkpoint: Path, text: Path, capsys: Capture
) -> None:
    output = text.parent / "packages" / "tuned"
    assert told in refused(capsys, tiny_checkpoint, "--text", text, "--output", output, *arguments)
    assert not output.exists()


def test_a_package_that_is_there_is_kept(tiny_checkpoint: Path, tiny_fp32: Path, text: Path, capsys: Capture) -> None:
    before = read_manifest(tiny_fp32)
    assert "exists and was kept" in refused(capsys, tiny_checkpoint, "--text", text, "--output", tiny_fp32)
    assert read_manifest(tiny_fp32) == before
