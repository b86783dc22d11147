"""python -m quantization.evaluate: what it prints, its bars, and what it refuses in one line."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantization.evaluate import main
from runtime.config import OFFICIAL_SIZES
from runtime.package import MODEL_FILES, TOKENIZER, WEIGHTS_SUFFIX, file_entry, read_manifest, write_manifest

from .conftest import bytes_checkpoint, converted

Capture = pytest.CaptureFixture[str]

ROOT = Path(__file__).parents[1]
TEXT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 3
PASSAGES = '{"text": "It was a dark and stormy night"}\n{"text": "He went to the sea"}\n'


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def lambada(tmp_path: Path) -> Path:
    path = tmp_path / "lambada.jsonl"
    path.write_text(PASSAGES, encoding="utf-8")
    return path


def told(capsys: Capture) -> dict[str, Any]:
    """The one JSON object that was printed, and nothing else."""
    printed = capsys.readouterr()
    assert printed.err == ""
    result: dict[str, Any] = json.loads(printed.out)
    return result


def refused(capsys: Capture, *arguments: object, status: int = 2) -> str:
    """The one line that ends a command."""
    try:
        got = main([str(argument) for argument in arguments])
    except SystemExit as usage:
        got = int(usage.code or 0)
    printed = capsys.readouterr()
    assert (got, printed.err.count("\n")) == (status, 1)
    assert status == 3 or printed.out == ""
    return printed.err


# What is told


def test_a_text_is_told_as_rows_and_a_receipt(tiny_fp32: Path, tiny_int8: Path, text: Path, capsys: Capture) -> None:
    arguments = [tiny_int8, "--reference", tiny_fp32, "--text", text, "--window", "32", "--stride", "8", "--json"]
    assert main([str(argument) for argument in arguments]) == 0
    result = told(capsys)
    reference, row = result["rows"]
    assert (reference["package"], reference["is_reference"]) == (str(tiny_fp32), True)
    assert (row["package"], row["is_reference"], row["precision"]) == (str(tiny_int8), False, "int8")
    assert (reference["kl"], reference["top1"], reference["perplexity_change"]) == (0, 1, 0)
    assert 0 < row["kl"] < 0.02
    assert row["tokens"] == row["bytes_scored"] == len(TEXT) - 1
    assert row["words"] == len(TEXT.split()) - 1
    assert row["perplexity"] == pytest.approx(reference["perplexity"] * (1 + row["perplexity_change"] / 100))
    assert row["bytes"] < reference["bytes"]
    assert (row["peak_rss_bytes"], row["paper"]) == (None, None)
    assert set(row["probability_change"]) == {"p1", "p5", "p50", "p95", "p99"}
    assert (result["receipt"]["window"], result["receipt"]["stride"], result["receipt"]["task"]) == (32, 8, "text")
    assert len(result["receipt"]["sha256"]) == 64


def test_without_a_reference_packages_are_judged_alone(
    tiny_fp32: Path, tiny_int8: Path, demo_int8: Path, text: Path, capsys: Capture
) -> None:
    """Of other tokenizers too; the narrowest context is everyone's window."""
    assert main([str(tiny_fp32), str(tiny_int8), str(demo_int8), "--text", str(text), "--json"]) == 0
    result = told(capsys)
    assert [row["kl"] for row in result["rows"]] == [None] * 3
    assert [row["peak_rss_bytes"] for row in result["rows"]] == [None] * 3
    assert result["rows"][2]["tokens"] < result["rows"][0]["tokens"]
    assert (result["receipt"]["window"], result["receipt"]["stride"]) == (64, 64)


def test_the_reference_may_be_named_among_the_packages(tiny_fp32: Path, text: Path, capsys: Capture) -> None:
    assert main([str(tiny_fp32), "--reference", str(tiny_fp32), "--text", str(text), "--json"]) == 0
    (row,) = told(capsys)["rows"]
    assert (row["kl"], row["kl_standard_error"], row["is_reference"]) == (0, 0, True)


def test_a_package_alone_tells_its_memory_on_a_terminal_too(tiny_fp32: Path, text: Path, capsys: Capture) -> None:
    assert main([str(tiny_fp32), "--text", str(text), "--tokens", "100", "--threads", "1"]) == 0
    heading, row, _, *receipt = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["package", "perplexity", "a", "word"]
    assert int(row.split()[-1].replace(",", "")) > 50
    assert "threads 1" in " ".join(receipt)


def test_lambada_is_told(tiny_fp32: Path, tiny_int8: Path, lambada: Path, capsys: Capture) -> None:
    assert main([str(tiny_fp32), str(tiny_int8), "--lambada", str(lambada), "--json"]) == 0
    result = told(capsys)
    for row in result["rows"]:
        assert row["passages"] == 2
        assert 0 <= row["accuracy"] <= row["last_token_accuracy"] <= 1
        assert row["perplexity"] > 1
        assert row["tokens_per_s"] > 0


def test_the_childrens_book_test_is_told(demo_int8: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "cbt.txt"
    context = "".join(f"{number} The horse was white .\n" for number in range(1, 21))
    path.write_text(f"{context}21 The XXXXX was white .\thorse\t\tsword|horse|was\n", encoding="utf-8")
    assert main([str(demo_int8), "--cbt", str(path), "--json"]) == 0
    (row,) = told(capsys)["rows"]
    assert (row["questions"], row["accuracy"], row["accuracy_standard_error"]) == (1, 1, None)


def test_the_papers_figures_stand_beside_an_official_size(
    tiny_fp32: Path, lambada: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_manifest(tiny_fp32).config
    monkeypatch.setattr("quantization.paper.OFFICIAL_SIZES", {**OFFICIAL_SIZES, "124M": config})
    assert main([str(tiny_fp32), "--lambada", str(lambada), "--dataset", "lambada"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("35.13, 45.99%")
    assert main([str(tiny_fp32), "--lambada", str(lambada)]) == 0
    assert "35.13" not in capsys.readouterr().out


def test_a_plot_is_drawn(tiny_fp32: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main([str(tiny_fp32), "--text", str(text), "--plot", str(tmp_path / "q.png")]) == 0
    assert (tmp_path / "q.png").stat().st_size > 1000


def test_run_as_a_module_it_needs_no_workshop_and_stays_silent(tiny_fp32: Path, text: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "quantization.evaluate", tiny_fp32, "--text", text, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_on_a_terminal_progress_is_one_line_that_goes_away(tiny_fp32: Path, text: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "quantization.evaluate", tiny_fp32, "--text", text]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert shown.startswith("windows 1 of 5\r")
    assert "\n" not in shown
    assert shown.endswith(f"\r{' ' * len('windows 5 of 5')}\r")


# Bars


def test_a_bar_that_is_reached_changes_nothing(tiny_fp32: Path, tiny_int8: Path, text: Path, capsys: Capture) -> None:
    bars = "kl=0.5,top1=0.01,top5=0.5,perplexity_change=50,perplexity=1e6,bits_per_byte=50"
    arguments = [tiny_int8, "--reference", tiny_fp32, "--text", text, "--bar", bars]
    assert main([str(argument) for argument in arguments]) == 0
    assert capsys.readouterr().err == ""


def test_a_missed_bar_ends_with_status_3_behind_the_figures(
    tiny_fp32: Path, tiny_int8: Path, text: Path, capsys: Capture
) -> None:
    arguments = [tiny_int8, "--reference", tiny_fp32, "--text", text, "--bar", "kl=0,perplexity=1e6", "--json"]
    assert main([str(argument) for argument in arguments]) == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rows"][1]["kl"] > 0
    assert printed.err.startswith(f"error: {tiny_int8}: kl ")
    assert "expected at most 0; " in printed.err
    assert printed.err.count("\n") == 1


def test_the_reference_itself_is_held_to_no_bar(tiny_fp32: Path, tiny_int8: Path, text: Path, capsys: Capture) -> None:
    arguments = (tiny_int8, "--reference", tiny_fp32, "--text", text, "--bar", "perplexity=1")
    assert str(tiny_fp32) not in refused(capsys, *arguments, status=3)


@pytest.mark.parametrize("bar", ["kl=0.1", "accuracy=0.5", "foo=1", ""])
def test_a_bar_that_is_not_measured_is_refused_before_any_work(bar: str, capsys: Capture) -> None:
    assert "--bar" in refused(capsys, "no-such-package", "--text", "no-such-file", "--bar", bar)


# Refusals


def test_a_text_shorter_than_a_window_is_refused(tiny_fp32: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "short").write_text("too short")
    line = refused(capsys, tiny_fp32, "--text", tmp_path / "short")
    assert "the text has 9 tokens, less than one window of 64" in line


def test_windows_that_do_not_fit_are_refused(tiny_fp32: Path, text: Path, capsys: Capture) -> None:
    assert "a window of 65 tokens does not fit the context of" in refused(
        capsys, tiny_fp32, "--text", text, "--window", 65
    )
    assert "stride 33 would leave tokens out" in refused(
        capsys, tiny_fp32, "--text", text, "--window", 32, "--stride", 33
    )
    assert "has 273 tokens, --tokens asks for 274" in refused(capsys, tiny_fp32, "--text", text, "--tokens", 274)
    assert "the text has 0 tokens" in refused(capsys, tiny_fp32, "--text", text, "--tokens", -3)


def test_a_reference_of_another_vocabulary_is_refused(
    tiny_fp32: Path, demo_int8: Path, text: Path, capsys: Capture
) -> None:
    line = refused(capsys, demo_int8, "--reference", tiny_fp32, "--text", text)
    assert f"{demo_int8} has another tokenizer or vocabulary than the reference, {tiny_fp32}" in line


def test_a_reference_that_cuts_text_elsewhere_is_refused(
    tiny_fp32: Path, copied: Callable[[Path], Path], text: Path, capsys: Capture
) -> None:
    """Same tokens, but two of them under each other's number."""
    folder = copied(tiny_fp32)
    tokenizer = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    replace_file(folder, TOKENIZER, json.dumps(tokenizer).encode())
    assert "has another tokenizer" in refused(capsys, folder, "--reference", tiny_fp32, "--text", text)


def test_a_reference_with_padded_rows_is_refused(tiny_fp32: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    """The same tokenizer, but other ids to choose from."""
    package = converted(bytes_checkpoint(tmp_path / "other", n_vocab=257), tmp_path, "fp32")
    manifest = read_manifest(package)
    assert main([str(package), "--reference", str(tiny_fp32), "--text", str(text), "--json"]) == 0
    capsys.readouterr()
    write_manifest(package, replace(manifest, config=replace(manifest.config, n_vocab=263)))
    assert "has another tokenizer or vocabulary" in refused(capsys, package, "--reference", tiny_fp32, "--text", text)


def test_a_package_of_nan_is_told(
    tiny_fp32: Path, copied: Callable[[Path], Path], text: Path, lambada: Path, capsys: Capture
) -> None:
    folder = copied(tiny_fp32)
    weights = folder / (MODEL_FILES["fp32"] + WEIGHTS_SUFFIX)
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    line = refused(capsys, folder, "--reference", tiny_fp32, "--text", text)
    assert f"{folder}: its logits are NaN or infinite in tokens 0 to 63 of the text" in line
    assert "its logits are NaN or infinite in line 1" in refused(capsys, folder, "--lambada", lambada)


def test_files_that_are_no_data_are_refused(tiny_fp32: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc\xe9def")
    assert "x: byte 3 is no UTF-8" in refused(capsys, tiny_fp32, "--text", path)
    path.write_text('{"text": "a b"}\nno json\n')
    assert "x: line 2 is not" in refused(capsys, tiny_fp32, "--lambada", path)
    assert "the question at line 1 is not 21 lines" in refused(capsys, tiny_fp32, "--cbt", path)
    for option in ("--text", "--lambada", "--cbt"):
        assert "absent: cannot be read" in refused(capsys, tiny_fp32, option, tmp_path / "absent")


def test_a_folder_that_is_no_package_is_told_before_another_is_run(
    tiny_fp32: Path, text: Path, lambada: Path, capsys: Capture
) -> None:
    assert "nowhere: no such folder" in refused(capsys, tiny_fp32, "nowhere", "--text", text)
    assert "nowhere: no such folder" in refused(capsys, tiny_fp32, "nowhere", "--lambada", lambada)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--text", "x", "--lambada", "y"], "not allowed with argument --text"),
        ([], "one of the arguments --text --lambada --cbt is required"),
        (["--lambada", "x", "--reference", "y"], "--reference goes with --text, not with --lambada"),
        (["--cbt", "x", "--tokens", "9"], "--tokens goes with --text, not with --cbt"),
        (["--text", "x", "--dataset", "lambada"], "--dataset lambada goes with --lambada"),
        (["--text", "x", "--plot", "q.pdf"], "expected a file name that ends with .svg or .png"),
    ],
)
def test_usage_that_contradicts_itself_is_refused(arguments: list[str], complaint: str, capsys: Capture) -> None:
    assert complaint in refused(capsys, "no-such-package", *arguments)


def replace_file(package: Path, name: str, content: bytes) -> None:
    """Give a package another file, and a manifest that agrees."""
    (package / name).write_bytes(content)
    manifest = read_manifest(package)
    write_manifest(package, replace(manifest, files={**manifest.files, name: file_entry(package / name)}))
