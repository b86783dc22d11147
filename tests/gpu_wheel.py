"""Environments that scripts/test makes: onnxruntime-gpu instead of onnxruntime, and both on top of each other."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.package import read_manifest, write_manifest

ROOT = Path(__file__).parent.parent

TIMEOUT_S = 60
"""Far beyond what any of these commands takes: one that hangs is to fail, not the whole suite."""


def python_of(environment: str) -> Path:
    """The interpreter of an environment; where it was not made, the test is skipped."""
    python = ROOT / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {environment} here: scripts/test makes it where there is an onnxruntime-gpu 1.31.1")
    return python


def run(python: Path | str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """An interpreter at the root of the repository."""
    return subprocess.run(
        [python, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        timeout=TIMEOUT_S,
    )


def made_for(package: Path, device: str) -> Path:
    """Have a package's manifest say another device."""
    changed: Mapping[str, object] = {"device": device}
    write_manifest(package, replace(read_manifest(package), **changed))
    return package
