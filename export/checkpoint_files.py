"""The bytes of a checkpoint: small files read whole within a limit, tensors read piece by piece.

Nothing is memory-mapped: mapped pages count as this process's memory, and a 6 GB checkpoint would need 6 GB.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from runtime.errors import CheckpointError

Float32Array = NDArray[np.float32]

PIECE_VALUES = 1 << 18  # 1 MiB of float32: stays in the L2 cache from the read over the checks to the copy
JSON_LIMIT_BYTES = 10 << 20  # a hundred times what the largest GPT-2 needs; parsed JSON takes many times its length
NAME_LIMIT = 256  # characters; GPT-2's longest tensor name has 35
RANK_LIMIT = 8  # GPT-2's tensors have at most three dimensions

# Stored type -> bytes per value. Everything is widened to float32, exactly except for F64.
READABLE_DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}


class Tensor(Protocol):
    """One tensor of a checkpoint, under the name and in the shape that its layout gives it."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def fault(self) -> str | None:
        """Why it cannot be read, as far as can be told without reading it."""

    def rows(self, count: int) -> Tensor:
        """The tensor of its first `count` rows."""

    def read(self) -> Float32Array:
        """The values, [*shape] float32, C-contiguous.

        Raises:
            CheckpointError: as `pieces`.
        """

    def pieces(self) -> Iterator[Float32Array]:
        """The same values in order, flat, PIECE_VALUES at a time. Nothing is valid before the last piece came.

        Raises:
            CheckpointError: the tensor has a `fault`, is damaged, or holds NaN or Inf.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies, and what its bytes mean. Reading it checks everything that can be checked.

    Attributes:
        name: as spelled in its file.
        dtype: F32, F16, BF16 or F64, little-endian; with any other the tensor has a `fault`.
        offset: bytes from the start of the file.
        size: bytes.
        file_size: bytes of the whole file.
        masked_crc32c: of the stored bytes, where the format records one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    size: int
    file_size: int
    masked_crc32c: int | None = None

    @property
    def fault(self) -> str | None:
        """Why this tensor cannot be read, as far as headers tell."""
        if self.dtype not in READABLE_DTYPES:
            return f"{self.name} has dtype {self.dtype}, expected one of {', '.join(READABLE_DTYPES)}"
        if math.prod(self.shape) * READABLE_DTYPES[self.dtype] != self.size:
            return f"{self.name} has {self.size} bytes, which is not {self.dtype} of shape {list(self.shape)}"
        if self.offset + self.size > self.file_size:
            end = self.offset + self.size
            return f"{self.name} ends at byte {end} of {self.path.name}, which has {self.file_size} bytes"
        return None

    def rows(self, count: int) -> StoredTensor:
        """As in `Tensor`; a checksum covers all rows, so it cannot hold for some."""
        row_size = self.size // self.shape[0]
        return replace(self, shape=(count, *self.shape[1:]), size=count * row_size, masked_crc32c=None)

    def read(self) -> Float32Array:
        """As in `Tensor`."""
        if self.fault:  # before memory is taken for a shape that no file backs
            raise CheckpointError(self.fault)
        values = np.empty(math.prod(self.shape), np.float32)
        start = 0
        for piece in self.pieces():
            values[start : start + piece.size] = piece
            start += piece.size
        return values.reshape(self.shape)

    def pieces(self) -> Iterator[Float32Array]:
        """As in `Tensor`.

        Raises:
            CheckpointError: the tensor has a `fault`, its bytes do not match their checksum, a value is NaN or Inf, or
                the file cannot be read.
        """
        if self.fault:
            raise CheckpointError(self.fault)
        crc, not_finite, done = 0, None, 0
        count, item_size = math.prod(self.shape), READABLE_DTYPES[self.dtype]
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                while done < count:
                    wanted = min(PIECE_VALUES, count - done)
                    raw = file.read(wanted * item_size)
                    if len(raw) != wanted * item_size:
                        raise CheckpointError(f"{self.name}: {self.path.name} became shorter while it was read")
                    if self.masked_crc32c is not None:
                        crc = google_crc32c.extend(crc, raw)
                    piece = _widen(raw, self.dtype)
                    if not_finite is None and not _is_finite(piece):
                        not_finite = done + int(np.argmin(np.isfinite(piece)))
                    yield piece
                    done += wanted
        except OSError as error:
            raise CheckpointError(f"{self.name}: {self.path} cannot be read: {error.strerror or error}") from error
        if self.masked_crc32c is not None and mask_crc32c(crc) != self.masked_crc32c:
            found = f"{mask_crc32c(crc):#010x} of its bytes, {self.masked_crc32c:#010x} recorded"
            raise CheckpointError(f"{self.name} is damaged: checksum {found}; copy {self.path.name} again")
        if not_finite is not None:
            raise _not_finite(self, not_finite)


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A tensor that is in memory, because its file cannot be read in parts, or has no bytes for it."""

    name: str
    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def fault(self) -> str | None:
        dtype = self.values.dtype
        return None if dtype.kind == "f" else f"{self.name} has dtype {dtype}, expected numbers with a fraction"

    def rows(self, count: int) -> HeldTensor:
        """As in `Tensor`."""
        return HeldTensor(self.name, self.values[:count])

    def read(self) -> Float32Array:
        """As in `Tensor`; always an array of its own."""
        for _ in self.pieces():
            pass
        return self.values.astype(np.float32, order="C")

    def pieces(self) -> Iterator[Float32Array]:
        """As in `Tensor`."""
        if self.fault:
            raise CheckpointError(self.fault)
        flat = self.values.reshape(-1)
        for start in range(0, flat.size, PIECE_VALUES):
            with np.errstate(over="ignore"):
                piece = flat[start : start + PIECE_VALUES].astype(np.float32)
            if not _is_finite(piece):
                raise _not_finite(self, start + int(np.argmin(np.isfinite(piece))))
            yield piece


def mask_crc32c(crc: int) -> int:
    """mask(crc) = (crc rotated right by 15 + 0xa282ead8) mod 2^32.

    Source: LevelDB's table format, which TensorFlow's tensor bundles use for blocks and tensors.
    """
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_small_file(path: Path, limit_bytes: int) -> bytes:
    """The whole file.

    Raises:
        CheckpointError: it cannot be read, or is longer than `limit_bytes`.
    """
    try:
        with path.open("rb") as file:
            # By its size: read(limit) takes memory for all of the limit first.
            content = file.read(min(os.fstat(file.fileno()).st_size, limit_bytes) + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) > limit_bytes:
        raise CheckpointError(f"{path} has more than {limit_bytes} bytes: too long for what its name says it is")
    return content


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        CheckpointError: the file cannot be read, or is no JSON object, or names a key twice.
    """
    return parse_json_object(read_small_file(path, JSON_LIMIT_BYTES), str(path))


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`; `where` names the text in errors.

    Raises:
        CheckpointError: it is no JSON object, or names a key twice.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not a JSON object")
    return value


def is_plain_name(name: str) -> bool:
    """Whether a tensor or file name from a file may be shown in a message of one line."""
    return 0 < len(name) <= NAME_LIMIT and name.isprintable()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("it names a key twice")
    return unique


def _not_finite(tensor: Tensor, first: int) -> CheckpointError:
    where = [int(i) for i in np.unravel_index(first, tensor.shape)]
    return CheckpointError(f"{tensor.name} holds NaN or Inf, first at {where}")


def _widen(raw: bytes, dtype: str) -> Float32Array:
    if dtype == "BF16":  # the upper half of a float32
        bits: NDArray[np.uint32] = np.frombuffer(raw, "<u2").astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
    stored = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype])
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite afterwards is refused with its place
        values: Float32Array = stored.astype(np.float32, copy=False)
    return values


def _is_finite(values: Float32Array) -> bool:
    """Minimum and maximum carry NaN and Inf with them, and need no array of booleans."""
    with np.errstate(invalid="ignore"):
        return math.isfinite(values.min()) and math.isfinite(values.max())
