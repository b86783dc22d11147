"""Activations of 7 bits, where a processor cannot multiply those of 8: exact there, nearly as good, and only there."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from quantization.divergence import kl_divergence
from runtime import needs
from runtime.activations import NARROW, WIDE, Activations
from runtime.decoder import Decoder
from runtime.errors import DeviceError
from runtime.needs import activations_here, check_needs
from runtime.package import Needs, open_package, read_manifest
from runtime.text_generator import TextGenerator, open_decoder
from runtime.verify import main as verify
from runtime.verify import replay

from .conftest import DEMO_CHECKPOINT, converted

IDS = np.random.default_rng(0).integers(0, 8191, 24)
NEEDS = Needs(onnxruntime="1.23.2", processor=("made_up", "dreamt_of"), narrows=True)
QEMU = shutil.which("qemu-x86_64")
NO_VNNI = "Haswell"
SAME_SUMS = 1e-4
"""Between processors that add floats in another order. Measured: 7.6e-6; saturated sums move a logit by 0.57."""

Logits = NDArray[np.float32]


def logits(package: Path, activations: Activations = WIDE) -> Logits:
    """After each of `IDS`, in one run, and after the first of them again, each in a step: [24 + 8, V]."""
    opened = open_package(package)
    decoder = Decoder.open(opened.model_path, opened.manifest.config, threads=1, activations=activations)
    steps = decoder.start(batch=1, capacity=8)
    pieces = [*decoder.logits(IDS), *(steps.decode_step(IDS[number : number + 1]).copy() for number in range(8))]
    return np.concatenate([piece.copy() for piece in pieces])


def on_a_processor_without_vnni(package: Path, activations: Activations, folder: Path) -> Logits:
    """`logits`, computed by an emulated processor; onnxruntime asks it what it has."""
    assert QEMU is not None
    name = "WIDE" if activations == WIDE else "NARROW"
    program = (
        f"import sys, numpy; sys.path[:0] = {[str(Path(__file__).parents[1]), *sys.path]!r}\n"
        "from pathlib import Path\n"
        f"from tests.test_activations import logits, {name}\n"
        f"numpy.save({str(folder / 'logits.npy')!r}, logits(Path({str(package)!r}), {name}))\n"
    )
    python = os.path.realpath(sys.executable)
    done = subprocess.run([QEMU, "-cpu", NO_VNNI, python, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: Logits = np.load(folder / "logits.npy")
    return result


def test_narrow_bytes_cannot_saturate_and_wide_ones_fill_a_byte() -> None:
    for activations, largest in ((NARROW, 127), (WIDE, 255)):
        assert activations.zero + activations.steps == largest
        assert activations.one_sided_zero + activations.one_sided_steps == largest
        assert activations.zero - activations.steps >= 0
    assert 2 * 127 * 127 < 2**15 < 2 * 255 * 127


def test_seven_bits_lose_little_more_than_eight(demo_fp32: Path, demo_int8: Path) -> None:
    reference, wide, narrow = logits(demo_fp32), logits(demo_int8), logits(demo_int8, NARROW)
    losses = [float(kl_divergence(reference, each).mean()) for each in (wide, narrow)]
    assert 0 < losses[0] < losses[1] < 0.01


def test_seven_bits_are_taken_where_the_processor_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "processor_features", lambda: frozenset({"avx2"}))
    assert activations_here(NEEDS) == NARROW
    check_needs(NEEDS, device="cpu")
    assert activations_here(replace(NEEDS, processor=("made_up", "avx2"))) == WIDE
    assert activations_here(replace(NEEDS, processor=())) == WIDE
    with pytest.raises(DeviceError, match="one of made_up, dreamt_of"):
        check_needs(replace(NEEDS, narrows=False), device="cpu")


@pytest.mark.parametrize(("machine", "expected"), [("x86_64", NARROW), ("AMD64", NARROW), ("arm64", WIDE)])
def test_where_the_system_does_not_tell_x86_takes_what_is_safe(
    machine: str, expected: Activations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "processor_features", lambda: None)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert activations_here(NEEDS) == expected
    assert activations_here(replace(NEEDS, narrows=False)) == WIDE


def test_a_package_runs_with_seven_bits_on_such_a_processor_and_says_so(
    demo_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_manifest(demo_int8).needs.narrows
    expected = logits(demo_int8, NARROW)[len(IDS) - 1]
    monkeypatch.setattr(needs, "processor_features", lambda: frozenset({"avx2"}))
    for prepacked_dir in (None, tmp_path, tmp_path):
        decoder = TextGenerator.load(demo_int8, threads=1, prepacked_dir=prepacked_dir).decoder
        assert np.array_equal(decoder.start(batch=1, capacity=len(IDS)).prefill(0, IDS), expected)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == 3 * [
        "this processor lacks avx512_vnni and avx_vnni and asimddp: activations are rounded to 7 bits instead of 8"
    ]


def test_golden_prompts_hold_on_either_side(demo_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a package that was converted with one kind of activations, where the other kind is taken."""
    assert verify([str(demo_int8)]) == 0
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(needs, "processor_features", lambda: frozenset({"avx2"}))
        assert verify([str(demo_int8)]) == 0
        narrow = converted(DEMO_CHECKPOINT, tmp_path, "int8")
        assert verify([str(narrow)]) == 0
        assert "7 bits" in (narrow / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert read_manifest(narrow).quality["kl"] < 0.01
    assert verify([str(narrow)]) == 0


def test_golden_prompts_of_another_model_hold_on_neither_side(demo_int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "processor_features", lambda: frozenset({"avx2"}))
    decoder = open_decoder(open_package(demo_int8))
    golden = read_manifest(demo_int8).golden[1]
    shifted = replace(golden, package_logits=tuple(logit + 4.0 for logit in golden.oracle_logits))
    assert replay(decoder, golden, other_activations=True).held
    assert not replay(decoder, replace(shifted, oracle_logits=shifted.package_logits), other_activations=True).held


@pytest.mark.skipif(QEMU is None, reason="no qemu-x86_64 here (Debian: qemu-user): other processors are not emulated")
def test_seven_bits_are_exact_without_vnni_where_eight_are_not(demo_int8: Path, tmp_path: Path) -> None:
    exact = on_a_processor_without_vnni(demo_int8, NARROW, tmp_path)
    assert np.abs(exact - logits(demo_int8, NARROW)).max() < SAME_SUMS
    saturated = on_a_processor_without_vnni(demo_int8, WIDE, tmp_path)
    assert np.abs(saturated - logits(demo_int8, WIDE)).max() > 100 * SAME_SUMS
