"""Whether files are in memory already: what makes a load warm, and what makes it cold. Linux."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

PAGE_BYTES = mmap.PAGESIZE

HOW_COLD = (
    "dropped from the page cache by posix_fadvise(POSIX_FADV_DONTNEED), checked by mincore; the caches of disk and "
    "hypervisor untouched"
)
"""How a report says that its cold loads were made cold."""


def drop_from_page_cache(paths: Iterable[Path]) -> bool:
    """Ask the kernel to forget the files' pages; False where it takes no such advice. Needs no privilege.

    Pages that are not yet on disk, or that a process has mapped, stay: `resident_share` tells.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
    return True


def resident_share(paths: Iterable[Path]) -> float | None:
    """Share of the files' pages that the page cache holds, 0 to 1; None where nobody can tell.

    Source: mincore(2).
    """
    pages = resident = 0
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError):
        return None
    for path in paths:
        size = path.stat().st_size
        if not size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
            n_pages = -(-size // PAGE_BYTES)
            states = (ctypes.c_ubyte * n_pages)()
            start = ctypes.c_char.from_buffer(view)  # a private mapping that is never written
            failed = mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), states)
            del start
            if failed:
                return None
        pages += n_pages
        resident += sum(state & 1 for state in states)
    return resident / pages if pages else None
