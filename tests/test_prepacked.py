"""Weights that a machine keeps rearranged: the same numbers, made once, and never a damaged one opened."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from runtime import prepacked
from runtime.errors import MachineError, RequestError
from runtime.generate import main as generate
from runtime.package import open_package
from runtime.prepacked import ABANDONED_AFTER_S, MODEL, SIZES, UNFINISHED, prepacked_model
from runtime.text_generator import TextGenerator, open_decoder

from .conftest import converted

PROMPT = np.random.default_rng(3).integers(0, 256, 40)


def logits(package: Path, prepacked_dir: Path | None = None) -> list[bytes]:
    """Of a prompt in one piece and of one more token, to the bit."""
    decoding = open_decoder(open_package(package), prepacked_dir=prepacked_dir).start(batch=1, capacity=len(PROMPT) + 1)
    return [decoding.prefill(0, PROMPT).tobytes(), decoding.decode_step(PROMPT[:1]).tobytes()]


@pytest.mark.parametrize("name", ["tiny_fp32", "tiny_int8", "tiny_int4", "demo_int8"])
def test_the_first_load_and_the_next_give_the_packages_own_numbers(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    package: Path = request.getfixturevalue(name)
    own = logits(package)
    assert logits(package, tmp_path) == own
    (entry,) = tmp_path.iterdir()
    made = {path: path.stat().st_mtime_ns for path in entry.iterdir()}
    assert entry / MODEL in made
    assert logits(package, tmp_path) == own
    assert {path: path.stat().st_mtime_ns for path in entry.iterdir()} == made


def test_an_entry_that_lost_bytes_is_made_anew(tiny_int8: Path, tmp_path: Path) -> None:
    model = prepacked_model(open_package(tiny_int8), tmp_path)
    whole = {path.name: path.read_bytes() for path in model.parent.iterdir()}
    for damaged in whole:
        (model.parent / damaged).write_bytes(whole[damaged][:-1])
        assert prepacked_model(open_package(tiny_int8), tmp_path) == model
        assert {path.name: path.stat().st_size for path in model.parent.iterdir()} == {
            name: len(content) for name, content in whole.items()
        }
    (model.parent / SIZES).unlink()
    assert logits(tiny_int8, tmp_path) == logits(tiny_int8)
    assert (model.parent / SIZES).exists()


def test_another_package_of_the_same_name_has_its_own_entry(
    tiny_checkpoint: Path, tiny_fp32: Path, tmp_path: Path
) -> None:
    first, cache = tmp_path / "packages" / "model", tmp_path / "cache"
    shutil.copytree(tiny_fp32, first)
    logits(first, cache)
    shutil.rmtree(first)
    shutil.copytree(converted(tiny_checkpoint, tmp_path / "anew", "int8"), first)
    assert logits(first, cache) == logits(first)
    assert len(list(cache.iterdir())) == 2


def test_two_that_load_at_once_share_an_entry(tiny_int8: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(lambda _number: logits(tiny_int8, tmp_path), range(4)))
    assert several == [logits(tiny_int8)] * 4
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_goes_after_a_while(tiny_int8: Path, tmp_path: Path) -> None:
    for left, age_s in (("old", ABANDONED_AFTER_S + 60), ("under-way", 60)):
        folder = tmp_path / f".another-package.{left}{UNFINISHED}"
        folder.mkdir()
        os.utime(folder, (time.time() - age_s,) * 2)
    entry = prepacked_model(open_package(tiny_int8), tmp_path).parent
    assert set(tmp_path.iterdir()) == {entry, tmp_path / f".another-package.under-way{UNFINISHED}"}


def test_another_onnxruntime_or_processor_has_its_own_entry(
    tiny_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = open_package(tiny_int8)
    entries = {prepacked_model(package, tmp_path)}
    with monkeypatch.context() as changed:
        changed.setattr(onnxruntime, "__version__", "9.9.9")
        entries.add(prepacked_model(package, tmp_path))
    with monkeypatch.context() as changed:
        changed.setattr(prepacked, "processor_features", lambda: frozenset({"avx2"}))
        entries.add(prepacked_model(package, tmp_path))
    assert len(entries) == len(list(tmp_path.iterdir())) == 3


def test_a_package_that_is_replaced_meanwhile_leaves_no_entry(tiny_int8: Path, tiny_int4: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(tiny_int8, package)
    opened = open_package(package)
    shutil.copyfile(tiny_int4 / "manifest.json", package / "manifest.json")
    with pytest.raises(MachineError, match="was replaced while it was opened"):
        prepacked_model(opened, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_entry_can_be_read_by_whoever_the_umask_lets(tiny_int8: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        entry = prepacked_model(open_package(tiny_int8), tmp_path).parent
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) & 0o044 for path in (entry, *entry.iterdir())} == {0o044}


def test_threads_are_refused_before_anything_is_made(tiny_int8: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="threads is 0"):
        TextGenerator.load(tiny_int8, threads=0, prepacked_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(tiny_int8: Path, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    with pytest.raises(MachineError, match=r"prepacked weights cannot be made \(File exists\); free space, name"):
        TextGenerator.load(tiny_int8, prepacked_dir=in_the_way)


def test_the_command_writes_the_same_text(tiny_int8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tiny_int8), "Once", "--max-new-tokens", "8", "--seed", "1"]
    assert generate(arguments) == 0
    plain = capsys.readouterr().out
    assert generate([*arguments, "--prepacked-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == plain
    assert len(list(tmp_path.iterdir())) == 1


def test_a_disk_that_fills_up_is_told_and_nothing_is_left(demo_int8: Path, tmp_path: Path) -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20,) * 2)"  # no file of over 1 MiB
    program = f"{limited}; import sys; from runtime.generate import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, demo_int8, "Once", "--max-new-tokens", "2", "--prepacked-dir", tmp_path]
    done = subprocess.run(
        list(map(str, command)), check=False, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "prepacked weights cannot be made" in done.stderr
    assert list(tmp_path.iterdir()) == []
