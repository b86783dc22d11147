"""NVIDIA's shared libraries: which ones a provider needs, where pip put them, and which are missing.

The system's loader does not look where pip installs to, and onnxruntime's own `preload_dlls` looks for a fixed list in
one layout and prints to standard output. Here the names are read from the provider's file; what the system does not
find is loaded from pip's folders, after which the provider finds it loaded.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

PIP_PACKAGES = ("nvidia", "tensorrt_libs")
"""Import packages that wheels put libraries into: nvidia/cu13/lib, nvidia/cudnn/lib, nvidia/cublas/lib; TensorRT's."""

OPENED_LATER = ("libcudnn.so.9",)
"""What the CUDA provider opens by name when a node first asks for it."""

PT_LOAD, PT_DYNAMIC = 1, 2
DT_NEEDED, DT_STRTAB = 1, 5


def missing_libraries(library: Path) -> list[str]:
    """Load what a shared library needs, and name what cannot be had, or what that needs in turn.

    Raises:
        OSError: the library cannot be read.
    """
    missing = [reason.partition(":")[0] for name in needed_libraries(library) if (reason := _load(name))]
    for name in OPENED_LATER:
        _load(name)
    return list(dict.fromkeys(missing))


def needed_libraries(library: Path) -> tuple[str, ...]:
    """Names that a 64-bit ELF file asks the loader for; none for a file of another format.

    Source: System V ABI, chapter 5 (dynamic section); ELF-64 object file format.
    """
    with library.open("rb") as file:
        header = file.read(64)
        if header[:6] != b"\x7fELF\x02\x01":
            return ()
        table, entry_size, entries = struct.unpack_from("<Q14xHH", header, 32)
        segments = [_read(file, "<IIQQQQ", table + index * entry_size) for index in range(entries)]
        loaded = [(address, offset, size) for kind, _, offset, address, _, size in segments if kind == PT_LOAD]
        sections = [(offset, size) for kind, _, offset, _, _, size in segments if kind == PT_DYNAMIC]
        tags = [entry for section in sections for entry in _dynamic_entries(file, *section)]
        strings = next(value for tag, value in tags if tag == DT_STRTAB)
        start = next(offset + strings - address for address, offset, size in loaded if 0 <= strings - address < size)
        return tuple(_text_at(file, start + value) for tag, value in tags if tag == DT_NEEDED)


def _dynamic_entries(file: BinaryIO, offset: int, size: int) -> list[tuple[int, int]]:
    """Tag and value, up to the one that ends them, whose tag is 0."""
    entries = []
    for place in range(offset, offset + size, 16):
        tag, value = _read(file, "<qQ", place)
        if tag == 0:
            break
        entries.append((tag, value))
    return entries


def _read(file: BinaryIO, layout: str, offset: int) -> tuple[int, ...]:
    file.seek(offset)
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _text_at(file: BinaryIO, offset: int) -> str:
    file.seek(offset)
    return file.read(256).partition(b"\0")[0].decode("ascii", errors="replace")


def _load(name: str) -> str | None:
    """Load a library, from where the system looks or from pip's folders; why not, if it cannot be had."""
    try:
        ctypes.CDLL(name)
        return None
    except OSError as error:
        reason = str(error)
    for folder in pip_folders():
        if (folder / name).is_file():
            try:
                ctypes.CDLL(str(folder / name))
                return None
            except OSError as error:
                reason = str(error)
    return reason


def pip_folders() -> Iterator[Path]:
    """Folders of pip's that hold NVIDIA's libraries."""
    for package in PIP_PACKAGES:
        spec = None
        with suppress(ImportError, ValueError):
            spec = find_spec(package)
        for location in (spec and spec.submodule_search_locations) or ():
            yield Path(location)
            yield from sorted(Path(location).glob("*/lib"))


def library_versions(library: Path) -> dict[str, str | None]:
    """Versions of what a provider runs on: cuda, cudnn, tensorrt; None for what it does not use or does not find.

    Source: cudaRuntimeGetVersion (1000 major + 10 minor); cudnnGetVersion and getInferLibVersion (10000 major + 100
    minor + patch, since cuDNN 9 and TensorRT 10).
    """
    names = {name.partition(".")[0]: name for name in (*OPENED_LATER, *needed_libraries(library))}
    cuda = ctypes.c_int()
    _ask(names.get("libcudart"), "cudaRuntimeGetVersion", ctypes.byref(cuda))
    return {
        "cuda": f"{cuda.value // 1000}.{cuda.value % 1000 // 10}" if cuda.value else None,
        "cudnn": _in_parts(_ask(names.get("libcudnn"), "cudnnGetVersion")),
        "tensorrt": _in_parts(_ask(names.get("libnvinfer"), "getInferLibVersion")),
    }


def _ask(name: str | None, function: str, *arguments: Any) -> int:
    """What a library's function returns; 0 where it cannot be asked."""
    try:
        return int(getattr(ctypes.CDLL(name), function)(*arguments)) if name else 0
    except (OSError, AttributeError):
        return 0


def _in_parts(number: int) -> str | None:
    return f"{number // 10000}.{number % 10000 // 100}.{number % 100}" if number else None
