"""python -m runtime.verify: the device-side certificate, which numpy and onnxruntime alone can give."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.package import MODEL_FILES, WEIGHTS_SUFFIX, open_package, read_manifest, write_manifest
from runtime.text_generator import open_decoder
from runtime.verify import main, replay, run_each_way

Copy = Callable[[Path], Path]

ROOT = Path(__file__).parent.parent
WEIGHTS = MODEL_FILES["fp32"] + WEIGHTS_SUFFIX


@pytest.fixture
def package(tiny_fp32: Path, copied: Copy) -> Path:
    return copied(tiny_fp32)


def damage_weights(package: Path, byte: bytes) -> None:
    """Overwrite the middle third of the weights; the file keeps its size."""
    path = package / WEIGHTS
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = byte * third
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["demo_fp32", "demo_int8", "tiny_fp32", "tiny_int8"])
def test_a_package_holds_where_it_was_made(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main([str(request.getfixturevalue(name)), "--full"]) == 0
    printed = capsys.readouterr()
    *golden, receipt = printed.out.splitlines()
    assert printed.out.count("held") == len(golden) == 3
    assert receipt.startswith("receipt: asked for cpu; nodes: ")
    assert printed.err == ""


def test_it_needs_no_tokenizers_onnx_or_torch(demo_int8: Path) -> None:
    code = """
import sys
for name in ("tokenizers", "onnx", "torch", "transformers", "optimum", "safetensors", "tqdm", "huggingface_hub"):
    sys.modules[name] = None
from runtime.verify import main
sys.exit(main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(demo_int8)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_run_as_a_module_it_warns_of_nothing(tiny_fp32: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "runtime.verify", str(tiny_fp32), "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["held"] is True


def test_json_is_one_object_with_every_prompt(tiny_fp32: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_fp32), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"held", "receipt", "golden"}
    for golden in result["golden"]:
        assert golden["held"] is True
        assert set(golden["largest_difference"]) == {"token by token", "one run", "pieces"}
        assert golden["greedy_ids"] == golden["expected_greedy_ids"]


def test_other_golden_logits_end_with_status_3(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(package)
    first, second, third = manifest.golden
    moved = replace(second, package_logits=tuple(logit + 1 for logit in second.package_logits))
    write_manifest(package, replace(manifest, golden=(first, moved, third)))
    assert main([str(package)]) == 3
    printed = capsys.readouterr()
    *golden, _receipt = printed.out.splitlines()
    assert ["held" in line for line in golden] == [True, False, True]
    assert "golden prompt 2 of 3 gave other numbers here than where the package was converted" in printed.err
    assert printed.err.count("\n") == 1


def test_other_golden_ids_end_with_status_3(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(package)
    first = manifest.golden[0]
    assert first.greedy_ids
    turned = replace(first, greedy_ids=(*first.greedy_ids[:-1], first.greedy_ids[-1] - 1))
    write_manifest(package, replace(manifest, golden=(turned, *manifest.golden[1:])))
    assert main([str(package)]) == 3
    assert "greedy ids differ" in capsys.readouterr().out


def test_a_damaged_copy_is_caught_by_replay(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage_weights(package, b"\0")
    assert main([str(package)]) == 3
    assert "runtime.verify --full tells if it was damaged" in capsys.readouterr().err


def test_a_damaged_copy_is_told_as_such_by_a_full_check(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage_weights(package, b"\0")
    assert main([str(package), "--full"]) == 2
    assert f"{WEIGHTS} was altered" in capsys.readouterr().err


def test_a_model_that_computes_nan_does_not_hold_and_json_stays_json(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_weights(package, b"\xff")
    assert main([str(package), "--json"]) == 3

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    result = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert result["held"] is False
    assert None in result["golden"][0]["largest_difference"].values()


def test_an_altered_file_ends_with_status_2(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (package / "LICENSE").write_text("mine")
    assert main([str(package)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "LICENSE has 4 bytes, the manifest says" in printed.err


def test_a_package_without_golden_prompts_certifies_nothing(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(package, replace(read_manifest(package), golden=()))
    assert main([str(package)]) == 2
    assert "no golden prompts to replay; convert the checkpoint again" in capsys.readouterr().err


def test_a_nan_is_never_within_the_tolerance(tiny_fp32: Path) -> None:
    package = open_package(tiny_fp32)
    result = replay(open_decoder(package), package.manifest.golden[0])
    assert result.held
    assert not replace(result, largest_difference={"one run": float("nan")}).held


@pytest.mark.parametrize("n_greedy", [0, 1, 4])
def test_every_way_gives_the_logits_of_the_same_ids(tiny_fp32: Path, n_greedy: int) -> None:
    prompt = np.arange(20, 31)
    greedy_ids, ways = run_each_way(open_decoder(open_package(tiny_fp32)), prompt, n_greedy=n_greedy)
    assert len(greedy_ids) == n_greedy
    assert {logits.shape for logits in ways.values()} == {(11 + max(0, n_greedy - 1), 257)}
    assert greedy_ids.tolist() == ways["token by token"].argmax(axis=-1)[10 : 10 + n_greedy].tolist()
