"""The command export.convert in this process, and what it left."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.convert import main


def run_main(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_one_line(text: str, *parts: str) -> None:
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    for part in parts:
        assert part in text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
