"""scripts/prove: an official size beside the paper. Its downloads are export.convert's, and are not tried here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.prove import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def lambada(tmp_path: Path) -> str:
    path = tmp_path / "lambada.jsonl"
    path.write_text('{"text": "It was a dark and stormy night"}\n', encoding="utf-8")
    return f"lambada={path}"


def test_without_a_network_one_line_says_where_it_looked(
    lambada: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert main(["124M", lambada, "--offline"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert "124M" in printed.err
    assert str(tmp_path) in printed.err
    assert list(tmp_path.iterdir()) == [tmp_path / "lambada.jsonl"]


def test_packages_that_are_there_are_judged(tiny_fp32: Path, lambada: str, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(tiny_fp32, tmp_path / "355M-fp32")
    assert main(["355M", lambada, "--precision", "fp32", "--packages", str(tmp_path), "--offline"]) == 0
    heading, columns, row = capsys.readouterr().out.strip().splitlines()[:3]
    assert heading == "355M on lambada"
    assert columns.endswith("paper")
    assert row.startswith(str(tmp_path / "355M-fp32")) or row.startswith("...")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["117M", "lambada=x"], "invalid choice: '117M'"),
        (["124M", "wikitext=x"], "'wikitext=x': expected NAME=FILE, the name one of lambada, cbt-cn"),
        (["124M", "lambada=absent"], "lambada: no such file: absent"),
        (["124M"], "the following arguments are required: NAME=FILE"),
        (["--precision", "int2", "124M", "lambada=x"], "'int2': expected some of fp32, int8"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: list[str], complaint: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--offline"])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert complaint in printed
