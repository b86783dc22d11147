"""As many processors as this process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import processor
from runtime.processor import available_processors

ROOT = Path(__file__).parent.parent


def test_the_affinity_mask_counts() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity masks")
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{one}}}); from runtime.processor import *; print(available_processors())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed.strip() == "1"


@pytest.mark.parametrize(("quota", "processors"), [(0.5, 1), (1.5, 1), (None, 8), (3.0, 3), (100.0, 8)])
def test_processors_are_the_mask_cut_to_the_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, processors: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(8)), raising=False)
    monkeypatch.setattr(processor, "processor_quota", lambda: quota)
    assert available_processors() == processors
