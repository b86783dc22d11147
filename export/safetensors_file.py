"""safetensors files, one or several with an index, read tensor by tensor with seek and read.

A file MUST be: eight bytes with the length of the header (little-endian), the header (a JSON object, padded with
spaces), the data. The header maps each name to its dtype, shape and [begin, end) in the data, and the tensors MUST
cover the data without hole or overlap. "__metadata__" holds free text.
Source: the format section of the safetensors documentation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.errors import CheckpointError

from .checkpoint_files import (
    JSON_LIMIT_BYTES,
    RANK_LIMIT,
    StoredTensor,
    is_plain_name,
    parse_json_object,
)
from .shards import read_shards

LENGTH_BYTES = 8


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Read and verify the header of one file.

    Args:
        path: the .safetensors file.
    Returns:
        Tensors by name, in the order of the header. One of a dtype that is not readable has a `fault`.
    Raises:
        CheckpointError: the file cannot be read, or its header or its length breaks the format.
    """
    header, data_start, file_size = _read_header(path)
    header.pop("__metadata__", None)
    try:
        tensors = {
            name: _parse_tensor(name, entry, path=path, data_start=data_start, file_size=file_size)
            for name, entry in header.items()
        }
        _refuse_holes(list(tensors.values()), data_start, file_size)
    except ValueError as error:
        raise CheckpointError(f"{path} is no readable safetensors file: {error}; copy it again") from error
    return tensors


def read_sharded_safetensors(index: Path) -> dict[str, StoredTensor]:
    """Read and verify the headers of all files that `model.safetensors.index.json` names; see `read_shards`."""
    return read_shards(index, ".safetensors", read_safetensors)


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(the header, where the data starts, bytes of the file)."""
    try:
        file_size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if file_size < LENGTH_BYTES or length > min(file_size - LENGTH_BYTES, JSON_LIMIT_BYTES):
                raise CheckpointError(
                    f"{path} has {file_size} bytes, its first eight ask for a header of {length}; copy it again"
                )
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_json_object(header, f"the header of {path}"), LENGTH_BYTES + length, file_size


def _parse_tensor(name: str, entry: object, *, path: Path, data_start: int, file_size: int) -> StoredTensor:
    if not is_plain_name(name):
        raise ValueError(f"tensor name {name[:80]!r} is not printable text")
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end], **rest} if not rest:
            if not is_plain_name(dtype):
                raise ValueError(f"the dtype of {name} is not printable text")
            if len(shape) > RANK_LIMIT or not all(_is_count(n) for n in (*shape, begin, end)) or begin > end:
                raise ValueError(f"{name} has no valid shape or offsets")
            return StoredTensor(
                name=name,
                dtype=dtype,
                shape=tuple(shape),
                path=path,
                offset=data_start + begin,
                size=end - begin,
                file_size=file_size,
            )
    raise ValueError(f"{name} is not described by exactly a dtype, a shape and two data_offsets")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _refuse_holes(tensors: list[StoredTensor], data_start: int, file_size: int) -> None:
    """Tensors must follow each other from the start of the data to the end of the file."""
    at = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size)):
        if tensor.offset != at:
            raise ValueError(f"{tensor.name} begins at byte {tensor.offset}, expected {at}: an overlap or a hole")
        at += tensor.size
    if at != file_size:
        raise ValueError(f"it has {file_size} bytes, its tensors end at {at}")
