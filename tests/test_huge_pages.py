"""Memory moves into huge pages, what it holds stays."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from runtime import huge_pages
from runtime.huge_pages import LEAST_BYTES, Gathering, gather, private_regions

SIZE = 3 * LEAST_BYTES


def huge_bytes(address: int) -> int:
    """Bytes in huge pages of the region that an address stands in, as Linux tells."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no such region")


def written_pages() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Anonymous memory of its own, small pages written one by one."""
    block = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_DONTFORK)  # unlike its neighbours, with which Linux would make it one region
    pages = np.frombuffer(block, np.uint8)
    pages[:] = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    return pages


@pytest.fixture
def supported() -> None:
    release = Path("/proc/sys/kernel/osrelease")
    version = tuple(map(int, release.read_text().split("-")[0].split(".")[:2])) if release.exists() else (0, 0)
    if version < (6, 1) or not huge_pages._page_bytes():
        pytest.skip("this system exchanges no pages: Linux 6.1 with transparent huge pages is needed")


@pytest.mark.usefixtures("supported")
def test_what_was_allocated_since_moves_and_keeps_its_bytes() -> None:
    before = private_regions()
    pages = written_pages()
    gather(since=before).wait()
    assert huge_bytes(pages.ctypes.data) >= SIZE - 2 * huge_pages._page_bytes()
    assert np.array_equal(pages, np.random.default_rng(0).integers(0, 256, SIZE, np.uint8))


@pytest.mark.usefixtures("supported")
def test_what_was_there_before_is_left_alone() -> None:
    pages = written_pages()
    huge_before = huge_bytes(pages.ctypes.data)
    gather(since=private_regions()).wait()
    assert huge_bytes(pages.ctypes.data) == huge_before


@pytest.mark.parametrize("setting", ["always madvise [never]\n", None])
def test_a_system_without_huge_pages_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None
) -> None:
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
        (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path)
    before = private_regions()
    pages = written_pages()
    gather(since=before).wait()
    assert huge_bytes(pages.ctypes.data) == 0


def test_regions_are_none_where_no_proc_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "MAPS", tmp_path / "maps")
    assert private_regions() == set()


def test_a_region_that_is_gone_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = (1 << 46, (1 << 46) + SIZE)
    monkeypatch.setattr(huge_pages, "private_regions", lambda: {gone})
    gather(since=()).wait()


def test_where_nothing_moves_nothing_is_waited_for() -> None:
    Gathering((), 1 << 21).wait()
