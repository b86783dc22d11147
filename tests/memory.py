"""What reading a hostile file may cost."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OVERHEAD_BYTES = 256 << 10
"""Python's own, for names, parsed headers and messages of tiny files. Measured: 29 KB."""


@contextmanager
def no_more_memory_than(*files: Path) -> Iterator[None]:
    """Hold what runs inside to the size of the files that it reads, at every moment."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= sum(path.stat().st_size for path in files) + OVERHEAD_BYTES
