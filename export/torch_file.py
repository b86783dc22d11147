"""Files that torch.save wrote, read with torch and weights_only=True: tensors and plain values, never code.

Since torch 1.6 such a file is a zip archive that MUST hold every storage as one record, not compressed. Torch then
reads the structure alone (map_location="meta") and says where each storage lies; values are read from there as from
any other layout, one tensor in memory at a time: of a file of 1.4 GB, 0.2 GB. Mapping it costs 1.4 GB, since mapped
pages count as this process's memory. Older files hold one pickle after the other, and are read as a whole.
"""

from __future__ import annotations

import io
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from runtime.errors import CheckpointError

from .checkpoint_files import HeldTensor, StoredTensor, Tensor, is_plain_name

logger = logging.getLogger(__name__)

REASON_LIMIT = 200  # characters of torch's own words in a message
ARCHIVE = b"PK\x03\x04"
LOCAL_HEADER_BYTES = 30  # of a zip record, before its name and its extra field
DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64"}

Records = dict[int, int]
"""Where the data of each record of a zip archive begins -> its bytes."""


def read_torch_file(path: Path) -> dict[Any, Any]:
    """Read what a file holds, each tensor as a `Tensor` that is named by its key.

    Args:
        path: the file.
    Returns:
        The dictionary, with all that is no tensor, or lies deeper than in a dictionary in it, as torch gives it.
    Raises:
        CheckpointError: torch is not installed; or the file cannot be read, is damaged, holds anything but tensors and
            plain values, or is no dictionary.
    """
    file_size, is_archive = _look_at(path)
    if is_archive:
        records = _read_records(path)
        content = _load(path, map_location="meta")
        if all(map(_is_located, _tensors(content))):
            return _with_tensors(content, lambda name, tensor: _locate(name, tensor, path, records, file_size))
        logger.warning("%s is read as a whole: some tensors are views, or this torch does not say where they lie", path)
        content = _load(path, map_location="cpu", mmap=True)
    else:
        logger.warning("%s is in torch's layout from before 1.6: all of its %d bytes are in memory", path, file_size)
        content = _load_from_before_1_6(path)
    return _with_tensors(content, lambda name, tensor: _hold(name, tensor, path, file_size))


def _look_at(path: Path) -> tuple[int, bool]:
    """(bytes of the file, whether torch takes it for an archive)."""
    try:
        with path.open("rb") as file:
            return path.stat().st_size, file.read(len(ARCHIVE)) == ARCHIVE
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


class _BoundedReader(io.BufferedReader):
    """Asked for more than the file has, Python takes memory for all of it first; and headers ask for anything."""

    def read(self, size: int | None = -1, /) -> bytes:
        rest = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(rest if size is None or size < 0 else min(size, rest))


def _load_from_before_1_6(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb", buffering=0) as raw, _BoundedReader(raw) as file:
            return _load(path, file, map_location="cpu")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _load(path: Path, file: io.BufferedReader | None = None, **options: Any) -> dict[Any, Any]:
    try:
        import torch  # noqa: PLC0415  a gigabyte, for two layouts
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{path} can be read with torch only: pip install 'gpt2-edge[torch]'") from error
    try:
        content = torch.load(path if file is None else file, weights_only=True, **options)
    except Exception as error:
        # A hostile pickle can make torch raise anything. Its text is long, and advises to trust the file: cut it.
        reason = re.sub(r"^.*WeightsUnpickler error: ", "", str(error), flags=re.DOTALL).strip() or type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as tensors and plain values: {_one_line(reason)}; copy it again, or save its state "
            "dict as safetensors where you trust it"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors")
    return content


def _one_line(text: str) -> str:
    return "".join(c for c in text.partition("\n")[0] if c.isprintable())[:REASON_LIMIT]


def _read_records(path: Path) -> Records:
    """All records; torch finds them by the same directory, but would also take what it cannot have written."""
    try:
        with path.open("rb", buffering=0) as raw, _BoundedReader(raw) as file, zipfile.ZipFile(file) as archive:
            records = {}
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
                    raise ValueError(f"its record {record.filename!r} is compressed or encrypted")
                if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                    raise ValueError("its tensors are big-endian, which is not supported")
                file.seek(record.header_offset)
                header = file.read(LOCAL_HEADER_BYTES)
                lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                records[record.header_offset + LOCAL_HEADER_BYTES + lengths] = record.file_size
            return records
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(
            f"{path} is no readable archive of torch: {_one_line(str(error))}; copy it again"
        ) from error


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "untyped_storage")


def _is_located(tensor: Any) -> bool:
    return tensor.is_contiguous() and hasattr(tensor.untyped_storage(), "_checkpoint_offset")


def _tensors(content: dict[Any, Any]) -> Iterator[Any]:
    """Those of the dictionary, and of the dictionaries in it. No deeper: nobody keeps a model's weights there."""
    for value in content.values():
        yield from filter(_is_tensor, value.values() if isinstance(value, dict) else (value,))


def _with_tensors(content: dict[Any, Any], replace: Callable[[str, Any], Tensor]) -> dict[Any, Any]:
    """The dictionary with each of `_tensors` replaced."""

    def replaced(values: dict[Any, Any]) -> dict[Any, Any]:
        return {key: replace(str(key), value) if _is_tensor(value) else value for key, value in values.items()}

    return replaced({key: replaced(value) if isinstance(value, dict) else value for key, value in content.items()})


def _locate(name: str, tensor: Any, path: Path, records: Records, file_size: int) -> StoredTensor:
    storage = tensor.untyped_storage()
    start = storage._checkpoint_offset
    _check(name, path, is_sound=records.get(start) == storage.nbytes())
    return StoredTensor(
        name=name,
        dtype=DTYPES.get(str(tensor.dtype), str(tensor.dtype)),
        shape=tuple(tensor.shape),
        path=path,
        offset=start + tensor.storage_offset() * tensor.element_size(),
        size=tensor.numel() * tensor.element_size(),
        file_size=file_size,
    )


def _hold(name: str, tensor: Any, path: Path, file_size: int) -> HeldTensor:
    _check(name, path, is_sound=tensor.numel() * tensor.element_size() <= file_size)
    if str(tensor.dtype) == "torch.bfloat16":  # which numpy does not know
        tensor = tensor.float()
    return HeldTensor(name, tensor.detach().numpy())


def _check(name: str, path: Path, *, is_sound: bool) -> None:
    if not is_plain_name(name):
        raise CheckpointError(f"{path}: tensor name {name[:80]!r} is not printable text")
    if not is_sound:
        raise CheckpointError(f"{path}: {name} is of another size than its bytes in the file; copy it again")
