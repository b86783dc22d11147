"""Conversions that are interrupted, killed, short of disk, or not alone: real processes, real signals, real disks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.package import open_package

from .convert_command import assert_one_line, names

REPOSITORY = Path(__file__).parent.parent
PATIENCE_S = 60
DISK_BYTES = 4 << 20
"""Room for the tiny package twice, not for the demo's 7.9 MB."""

STAGES = {"weights": "onnx/model_quantized.onnx_data", "verification": "manifest.json"}
"""A file that is there once a conversion is as far."""


def start(checkpoint: str | Path, output: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "export.convert",
        str(checkpoint),
        "--output",
        str(output),
        "--allow-loss",
        *options,
    ]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert process.poll() is None, "the conversion ended before it was as far"
        assert time.monotonic() < until
        time.sleep(0.001)


def assert_old_package(package: Path, old: Path) -> None:
    """Still the one that was there: every byte."""
    open_package(package, full=True)
    assert (package / "manifest.json").read_bytes() == (old / "manifest.json").read_bytes()


@pytest.fixture
def package(tmp_path: Path, tiny_int8: Path) -> Path:
    """A package that stands where the demo is about to be converted to."""
    return Path(shutil.copytree(tiny_int8, tmp_path / "packages" / "x"))


@pytest.fixture
def small_disk(tmp_path: Path, tiny_int8: Path) -> Iterator[Path]:
    """A memory disk of 4 MB with a package on it; the test is skipped where mounting is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command to make a small disk with")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")
    try:
        shutil.copytree(tiny_int8, folder / "x")
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# Interrupted and killed


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupt_leaves_the_old_package(package: Path, tiny_int8: Path, stage: str) -> None:
    process = start("demo", package, "--force")
    wait_for(package.with_name(".x.partial") / STAGES[stage], process)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "", "error: interrupted\n")
    assert_old_package(package, tiny_int8)
    assert names(package.parent) == ["x"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_leaves_the_old_package_and_the_next_run_clears_up(
    package: Path, tiny_int8: Path, tiny_checkpoint: Path, stage: str
) -> None:
    process = start("demo", package, "--force")
    wait_for(package.with_name(".x.partial") / STAGES[stage], process)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert_old_package(package, tiny_int8)
    assert names(package.parent) == [".x.partial", "x"]
    status, _, err = finish(start(tiny_checkpoint, package, "--force"))
    assert (status, err) == (0, "")
    open_package(package, full=True)
    assert names(package.parent) == ["x"]


def test_kills_at_random_moments_leave_whole_packages(tiny_checkpoint: Path) -> None:
    """A hundred, of the demo model, are a matter of minutes: the same script, without --times."""
    done = subprocess.run(
        [sys.executable, "benchmarks/kill_conversions.py", str(tiny_checkpoint), "--times", "8"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "after each kill the package verified" in done.stdout


# Disks


def test_a_full_disk_leaves_the_old_package(small_disk: Path, tiny_int8: Path) -> None:
    status, out, err = finish(start("demo", small_disk / "x", "--force"))
    assert (status, out) == (1, "")
    assert_one_line(err)
    assert "No space left on device; free space and run again" in err
    assert_old_package(small_disk / "x", tiny_int8)
    assert names(small_disk) == ["x"]


def test_a_disk_with_just_enough_room_is_enough(small_disk: Path, tiny_checkpoint: Path) -> None:
    assert finish(start(tiny_checkpoint, small_disk / "x", "--force"))[0] == 0
    open_package(small_disk / "x", full=True)


def test_a_parent_folder_that_cannot_be_written_is_told(
    tmp_path: Path, tiny_checkpoint: Path, request: pytest.FixtureRequest
) -> None:
    if os.geteuid():
        parent = tmp_path / "read only"
        parent.mkdir(mode=0o555)
    else:  # permissions mean nothing to root
        parent = request.getfixturevalue("small_disk")
        subprocess.run(["mount", "-o", "remount,ro", str(parent)], check=True)
    before = names(parent)
    status, out, err = finish(start(tiny_checkpoint, parent / "y"))
    assert (status, out) == (1, "")
    assert_one_line(err)
    assert f"{parent / '.y.partial'}: " in err
    assert names(parent) == before


def test_a_file_in_place_of_the_parent_folder_is_told(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "file").touch()
    status, _, err = finish(start(tiny_checkpoint, tmp_path / "file" / "x"))
    assert status == 1
    assert_one_line(err)
    assert f"{tmp_path / 'file'}: " in err


# Not alone


def test_two_at_once_give_one_package(tmp_path: Path) -> None:
    package = tmp_path / "packages" / "x"
    first = start("demo", package)
    wait_for(package.with_name(".x.partial"), first)
    status, out, err = finish(start("demo", package))
    assert (status, out) == (2, "")
    assert_one_line(err)
    assert "another conversion is writing it" in err or "exists and was kept" in err
    assert finish(first)[0] == 0
    open_package(package, full=True)
    assert names(package.parent) == ["x"]


def test_many_at_once_with_force_give_one_package(tmp_path: Path, tiny_checkpoint: Path) -> None:
    package = tmp_path / "x"
    results = [finish(process) for process in [start(tiny_checkpoint, package, "--force") for _ in range(3)]]
    assert 0 in [status for status, _, _ in results]
    for status, _, err in results:
        if status:
            assert status == 2
            assert_one_line(err)
            assert "another conversion is writing it" in err
    open_package(package, full=True)
    assert names(tmp_path) == ["x"]
