"""The file of a saved session: its tokens, their keys and values, and how it goes on.

A session file is an npz, readable with numpy alone, and MUST hold these arrays and no others, none compressed:

    state        [N] uint8             JSON: format version, digests of the package, sampling options, sample
    ids          [T] int64             token ids, all of them ids of the model
    generated    [T] uint8             1 where the model chose the token, 0 where it was given
    past         [2L, H, P, D]         keys and values of the first P tokens, P < T, of the package's `CacheType`

A reader MUST check an array's name, type, shape and bytes before it makes room for it, so that no file can ask for more
memory than the longest session of the package takes. Each array's CRC tells bytes that changed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .errors import MachineError, RequestError, SessionError
from .kv_cache import Buffer
from .package import CACHE_KINDS, MODEL_FILES, TOKENIZER, WEIGHTS_SUFFIX, Manifest
from .sampling import UINT64_MASK, SamplingOptions

SESSION_FORMAT_VERSION = 1

ARRAYS = ("state", "ids", "generated", "past")
STATE_LIMIT_BYTES = 1 << 20
DIRECTORY_LIMIT_BYTES = 1 << 12
"""Of the zip's list of members: four take 300."""
HEADER_LIMIT_BYTES = 1 << 10
FILE_LIMIT_BYTES = (1 << 31) - (1 << 20)
"""Beyond 2 GiB a zip takes another form. A full session of 1558M has 0.63 GB."""
PIECE_BYTES = 1 << 20

END_OF_DIRECTORY = struct.Struct("<4s4xHHL4xH")
"""Signature, members, members, bytes of the directory, bytes of a comment: the last record of a zip.
Source: PKWARE, APPNOTE.TXT 6.3.10, section 4.3.16."""
LARGE_FILE_LOCATOR = struct.Struct("<4s16x")
ARRAY_HEADER = re.compile(rb"\{'descr': '([<|]\w\d)', 'fortran_order': False, 'shape': \(([\d, ]*)\), \} *\n")
"""As numpy.lib.format writes it, a dictionary in Python's spelling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSession:
    """What a session is, apart from the package that it belongs to."""

    ids: NDArray[np.int64]  # [T]
    generated: NDArray[np.bool_]  # [T]
    past: Buffer  # [2L, H, P, D]
    sampling: SamplingOptions  # its seed is given
    sample: int


def write_session(path: Path, saved: SavedSession, manifest: Manifest) -> None:
    """Write a session beside its place and move it there: what stood there stays whole until then.

    Raises:
        RequestError: it is larger than its file can be.
        MachineError: it cannot be written.
    """
    if saved.past.nbytes > FILE_LIMIT_BYTES:
        raise RequestError(
            f"{path}: the session's keys and values take {saved.past.nbytes:,} bytes, a session file holds up to "
            f"{FILE_LIMIT_BYTES:,}; rewind it, or save its ids alone"
        )
    state = {
        "format_version": SESSION_FORMAT_VERSION,
        "package": _digests(manifest),
        "sample": saved.sample,
        "sampling": asdict(saved.sampling),
    }
    spelled = json.dumps(state).encode()
    if len(spelled) > STATE_LIMIT_BYTES:
        raise RequestError(
            f"{path}: the session's sampling options take {len(spelled):,} bytes, a session file holds up to "
            f"{STATE_LIMIT_BYTES:,}; save it with fewer of sequence_bias and bad_words_ids"
        )
    unfinished = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.unfinished"
    try:
        try:
            with unfinished.open("xb") as file:
                np.savez(
                    file,
                    state=np.frombuffer(spelled, np.uint8),
                    ids=saved.ids,
                    generated=saved.generated.astype(np.uint8),
                    past=saved.past,
                )
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise MachineError(
            f"{path}: the session cannot be saved ({error.strerror or error}); free space or name another file"
        ) from error


def read_session(path: Path, manifest: Manifest, *, reencode: bool = False) -> SavedSession:
    """Read a session that was saved with a package.

    Args:
        path: the file.
        manifest: of the package that is to go on with it.
        reencode: take the ids of a session of another package too, if their texts are the same: all as if they were
            given, and without keys and values.
    Raises:
        SessionError: the file is missing, damaged, no session, or belongs to another package.
    """
    try:
        with path.open("rb") as file:
            _check_directory(file)
            with zipfile.ZipFile(file) as archive:
                return _read_arrays(archive, manifest, reencode=reencode)
    except OSError as error:
        raise SessionError(
            f"{path}: the session cannot be read ({error.strerror or error}); name another file, or begin a new session"
        ) from error
    except _Foreign as error:
        raise SessionError(f"{path}: {error}") from error
    except (ValueError, KeyError, EOFError, RecursionError, RuntimeError, struct.error, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SessionError(
            f"{path} is no whole session file: {reason}; take a copy of it, or begin a new session"
        ) from error


class _Foreign(Exception):
    """A whole file that this package cannot go on with."""


def _check_directory(file: IO[bytes]) -> None:
    """Refuse what is no zip of four members, before anything reads a list of members of any length."""
    size = file.seek(0, os.SEEK_END)
    tail_bytes = END_OF_DIRECTORY.size + LARGE_FILE_LOCATOR.size
    if size < tail_bytes:
        raise ValueError(f"it has {size} bytes, too few for any session")
    file.seek(size - tail_bytes)
    (locator,) = LARGE_FILE_LOCATOR.unpack(file.read(LARGE_FILE_LOCATOR.size))
    signature, here, members, directory_bytes, comment_bytes = END_OF_DIRECTORY.unpack(file.read())
    if signature != b"PK\5\6" or locator == b"PK\6\7" or comment_bytes:
        raise ValueError("its end is not an npz file's: it was cut, or is something else")
    if (here, members) != (len(ARRAYS), len(ARRAYS)) or directory_bytes > DIRECTORY_LIMIT_BYTES:
        raise ValueError(f"it holds {members} arrays, listed in {directory_bytes} bytes, expected {', '.join(ARRAYS)}")


def _read_arrays(archive: zipfile.ZipFile, manifest: Manifest, *, reencode: bool) -> SavedSession:
    names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
    if sorted(names) != sorted(ARRAYS):
        raise ValueError(f"it holds {ascii(names)[:200]}, expected {', '.join(ARRAYS)}")
    members = dict(zip(names, archive.infolist(), strict=True))
    config = manifest.config
    state = _read_state(_read(archive, members["state"], np.dtype(np.uint8), (STATE_LIMIT_BYTES,)).tobytes())
    ours = _is_ours(state["package"], _digests(manifest), reencode=reencode)
    ids = _read(archive, members["ids"], np.dtype(np.int64), (config.n_ctx,))
    generated = _read(archive, members["generated"], np.dtype(np.uint8), (config.n_ctx,))
    if len(generated) != len(ids) or (generated > 1).any():
        raise ValueError(f"generated marks {len(generated)} tokens by 0 and 1, expected {len(ids)}")
    outside = ids[(ids < 0) | (ids >= config.n_vocab)]
    if len(outside):
        raise ValueError(f"token id {outside[0]} is not in the model, expected 0 to {config.n_vocab - 1}")
    limits = (len(CACHE_KINDS) * config.n_layer, config.n_head, max(len(ids) - 1, 0), config.head_dim)
    dtype = np.dtype(manifest.kv_cache)
    if ours:
        past = _read(archive, members["past"], dtype, limits, growing=2)
        if past.dtype.kind == "f" and not all(np.isfinite(buffer).all() for buffer in past):
            raise ValueError("past holds numbers that are not finite")
    else:
        past, generated = np.empty((*limits[:2], 0, limits[3]), dtype), np.zeros_like(generated)
    return SavedSession(
        ids=ids, generated=generated.astype(np.bool_), past=past, sampling=_sampling(state), sample=state["sample"]
    )


def _read_state(spelled: bytes) -> dict[str, Any]:
    state = json.loads(spelled)
    version = state.get("format_version") if isinstance(state, dict) else None
    if version != SESSION_FORMAT_VERSION:
        step = "update gpt2-edge" if type(version) is int and version > SESSION_FORMAT_VERSION else "save it again"
        raise _Foreign(f"session format version {version!r:.40}, this runtime reads {SESSION_FORMAT_VERSION}; {step}")
    match state:
        case {"package": dict(), "sampling": dict(), "sample": int(sample)} if 0 <= sample <= UINT64_MASK:
            return dict(state)
    raise ValueError("its state lacks package, sampling or sample")


def _sampling(state: Mapping[str, Any]) -> SamplingOptions:
    try:
        sampling = SamplingOptions(**state["sampling"])
    except (RequestError, TypeError) as error:
        raise ValueError(f"{error}") from error
    if sampling.seed is None:
        raise ValueError("its seed is null, expected a whole number")
    return sampling


def _digests(manifest: Manifest) -> dict[str, str]:
    """What the numbers of a session depend on."""
    graph = MODEL_FILES[manifest.precision]
    names = {"graph": graph, "weights": graph + WEIGHTS_SUFFIX, "tokenizer": TOKENIZER}
    return {part: manifest.files[name].sha256 for part, name in names.items()}


def _is_ours(saved: Mapping[str, Any], expected: Mapping[str, str], *, reencode: bool) -> bool:
    """Whether keys and values can be taken as they are."""
    differing = [part for part in expected if saved.get(part) != expected[part]]
    if not differing:
        return True
    told = ", ".join(f"{part} {str(saved.get(part))[:8]!r}, expected {expected[part][:8]!r}" for part in differing)
    if "tokenizer" in differing:
        raise _Foreign(f"saved with another tokenizer ({told}): its ids mean other text; open it with its own package")
    if not reencode:
        raise _Foreign(f"saved with another package ({told}); open it with that one, or let its ids be encoded again")
    return False


def _read(
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    dtype: np.dtype[Any],
    limits: tuple[int, ...],
    *,
    growing: int = 0,
) -> NDArray[Any]:
    """One array, of this dtype and shape, or a smaller one along the axis `growing`."""
    name = member.filename
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        raise ValueError(f"{name} is compressed, expected stored")
    with archive.open(member) as file:
        found, shape = _read_array_header(file, name)
        fits = len(shape) == len(limits) and shape[growing] <= limits[growing]
        if found != dtype.str or not fits or any(shape[i] != limits[i] for i in range(len(limits)) if i != growing):
            wanted = (*limits[:growing], f"0 to {limits[growing]}", *limits[growing + 1 :])
            raise ValueError(
                f"{name} is {found} {_spelled(shape)}, expected {dtype.str} {_spelled(wanted)} for this package"
            )
        array = np.empty(shape, dtype)
        if member.file_size != file.tell() + array.nbytes:
            raise ValueError(f"{name} has {member.file_size} bytes, expected {file.tell() + array.nbytes}")
        into = array.reshape(-1).view(np.uint8)
        for start in range(0, array.nbytes, PIECE_BYTES):
            piece = into[start : start + PIECE_BYTES]
            piece[:] = np.frombuffer(file.read(len(piece)), np.uint8)
    return array


def _read_array_header(file: IO[bytes], name: str) -> tuple[str, tuple[int, ...]]:
    """The dtype and shape that stand before an array's items."""
    start = file.read(10)
    if start[:8] != b"\x93NUMPY\1\0" or (length := int.from_bytes(start[8:], "little")) > HEADER_LIMIT_BYTES:
        raise ValueError(f"{name} is no array of numpy's format 1.0")
    header = ARRAY_HEADER.fullmatch(file.read(length))
    if header is None:
        raise ValueError(f"{name} holds no plain numbers in rows")
    return header[1].decode(), tuple(int(size) for size in header[2].split(b",") if size.strip())


def _spelled(shape: Sequence[object]) -> str:
    return f"[{', '.join(map(str, shape))}]"
