"""Quality against speed as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantization.quality_plot import check_plot_file, write_plot
from runtime.errors import RequestError

from .test_isolation import run_without


def rows(**figures: float | None) -> list[dict[str, Any]]:
    return [
        {"package": f"packages/{name}", "tokens_per_s": speed, "bytes": size, **figures}
        for name, speed, size in (("x-fp32", 100.0, 28e6), ("x-int8", 250.0, 8e6))
    ]


@pytest.mark.parametrize(("name", "start"), [("q.png", b"\x89PNG"), ("q.svg", b"<?xml")])
def test_a_picture_is_written(tmp_path: Path, name: str, start: bytes) -> None:
    check_plot_file(tmp_path / name)
    write_plot(tmp_path / name, rows(kl=0.001, perplexity=60.0), title="text")
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("figures", "axis"),
    [
        ({"kl": 0.001, "perplexity": 60.0}, "KL divergence"),
        ({"kl": None, "perplexity": 60.0}, "perplexity (lower"),
        ({"accuracy": 0.5}, "accuracy (higher"),
    ],
)
def test_it_says_what_it_shows(tmp_path: Path, figures: dict[str, float | None], axis: str) -> None:
    write_plot(tmp_path / "q.svg", rows(**figures), title="wiki.test.raw")
    comments = [line for line in (tmp_path / "q.svg").read_text(encoding="utf-8").splitlines() if "<!--" in line]
    assert any(axis in line for line in comments)
    for label in ("x-fp32", "28.0 MB", "x-int8", "8.0 MB", "wiki.test.raw", "tokens/s while scoring"):
        assert any(label in line for line in comments)


def test_a_kind_of_picture_that_is_not_drawn_is_refused() -> None:
    with pytest.raises(RequestError, match=r"--plot q.pdf: expected a file name that ends with .svg or .png"):
        check_plot_file(Path("q.pdf"))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"there is no folder .*/absent; make it first"):
        check_plot_file(tmp_path / "absent" / "q.png")


def test_without_matplotlib_one_line_says_what_to_install_and_no_work_is_done(tiny_fp32: Path, tmp_path: Path) -> None:
    arguments = (str(tiny_fp32), "--text", str(tmp_path / "absent"), "--plot", str(tmp_path / "q.png"))
    result = run_without(["matplotlib"], "quantization.evaluate", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "pip install 'gpt2-edge[plot]'" in result.stderr
