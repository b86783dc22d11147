"""A package under judgement: its clock, its size, and logits that are no numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantization.scored_package import ScoredPackage
from runtime.errors import PackageError


def test_logits_are_the_decoders_and_are_counted(tiny_fp32: Path) -> None:
    package = ScoredPackage(tiny_fp32)
    ids = np.arange(40)
    expected = np.concatenate([logits.copy() for logits in package.generator.decoder.logits(ids)])
    got = np.concatenate([logits.copy() for logits in package.logits(ids, where="here")])
    np.testing.assert_array_equal(got, expected)
    assert package.tokens_run == 40
    assert package.seconds > 0
    assert package.cost(alone=True).tokens_per_s == 40 / package.seconds


@pytest.mark.parametrize(("name", "bits"), [("demo_fp32", 32), ("demo_int8", 8.7)])
def test_the_cost_is_of_the_files(request: pytest.FixtureRequest, name: str, bits: float) -> None:
    folder: Path = request.getfixturevalue(name)
    package = ScoredPackage(folder)
    list(package.logits(np.arange(4), where="here"))
    cost = package.cost(alone=True)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert cost.bytes == sum(path.stat().st_size for path in files)
    assert cost.bits_per_weight == pytest.approx(bits, rel=0.01)
    assert cost.peak_rss_bytes is not None
    assert cost.peak_rss_bytes > 50e6  # numpy and onnxruntime alone
    assert package.cost(alone=False).peak_rss_bytes is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_logit_is_enough(tiny_fp32: Path, value: float) -> None:
    package = ScoredPackage(tiny_fp32)
    bad = np.zeros((2, 257), np.float32)
    bad[1, 7] = value
    with pytest.raises(PackageError, match=r"its logits are NaN or infinite in line 3; python -m runtime.verify"):
        list(package.watched(iter([np.zeros((2, 257), np.float32), bad]), n_tokens=4, where="line 3"))
