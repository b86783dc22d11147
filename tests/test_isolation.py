"""The device has the runtime and little else: what it does where the workshop's libraries cannot be imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

WORKSHOP = (
    "export",
    "quantization",
    "onnx",
    "torch",
    "transformers",
    "optimum",
    "safetensors",
    "google_crc32c",
    "huggingface_hub",
    "tqdm",
)

RUN = """
import runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
sys.argv[0] = {module!r}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


def run_without(
    blocked: Sequence[str], module: str, *arguments: str, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """python -m module arguments, in a process in which some packages cannot be imported."""
    program = RUN.format(blocked=tuple(blocked), module=module)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_text_is_written_without_the_workshop(demo_int8: Path) -> None:
    arguments = (str(demo_int8), "Once upon a time", "--greedy", "--max-new-tokens", "8", "--json")
    result = run_without(WORKSHOP, "runtime.generate", *arguments)
    assert result.returncode == 0, result.stderr
    (sample,) = json.loads(result.stdout)["samples"]
    assert len(sample["ids"]) == 8


def test_latency_is_measured_without_the_workshop(demo_int8: Path) -> None:
    arguments = (
        str(demo_int8),
        "--prompt-tokens",
        "8",
        "--new-tokens",
        "3",
        "--runs",
        "1",
        "--load-runs",
        "0",
        "--json",
    )
    result = run_without([*WORKSHOP, "matplotlib"], "runtime.benchmark", *arguments)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["rows"]
    assert row["itl_ms"]["n"] == 2


def test_a_package_is_verified_without_tokenizers_too(demo_int8: Path) -> None:
    result = run_without([*WORKSHOP, "tokenizers"], "runtime.verify", str(demo_int8), "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["held"] is True


def test_text_without_tokenizers_is_one_line_that_says_what_to_install(demo_int8: Path) -> None:
    result = run_without(["tokenizers"], "runtime.generate", str(demo_int8), "Once")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "pip install tokenizers" in result.stderr


def test_a_copy_of_the_runtime_under_another_name_writes_the_same(demo_int8: Path, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "runtime", tmp_path / "vendored" / "gpt2", ignore=ignored)
    arguments = (str(demo_int8), "Once upon a time", "--greedy", "--max-new-tokens", "8")
    original = run_without(WORKSHOP, "runtime.generate", *arguments)
    copy = run_without([*WORKSHOP, "runtime"], "vendored.gpt2.generate", *arguments, cwd=tmp_path)
    assert copy.returncode == 0, copy.stderr
    assert copy.stdout == original.stdout != ""


@pytest.mark.parametrize("name", ["onnx", "export"])
def test_what_is_blocked_cannot_be_imported(name: str) -> None:
    """Else the tests above would prove nothing."""
    result = run_without(WORKSHOP, name)
    assert result.returncode == 1
    assert f"{name} is blocked" in result.stderr
