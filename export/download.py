"""One file from a server to the disk: resumed where it broke off, proved, and under its name only when it is whole.

    NAME.part    what has come so far, claimed by a lock that ends with its process; the next run goes on from there

Written here because huggingface_hub 2 begins anew in every process, and compares no hash with what it received.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from runtime import __version__
from runtime.errors import CheckpointError

Progress = Callable[[str, int, int], None]
"""(what is done, steps done, steps in all); for a download the steps are bytes."""

NO_HEADERS: Mapping[str, str] = {}
PIECE_BYTES = 1 << 16  # at most this is lost when the process is killed
TIMEOUT_S = 30  # without a byte
ATTEMPTS = 5  # in a row that bring no byte
FIRST_PAUSE_S = 0.5  # doubled after every attempt in a row that brought none: 7.5 s in all
PASSING_STATUSES = (408, 429, 500, 502, 503, 504)
PARTIAL_CONTENT = 206


class UnreachableError(CheckpointError):
    """A server that cannot be reached, or does not give what it was asked for: another may.

    Attributes:
        status: of HTTP, where the server answered.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _BrokenOffError(Exception):
    """What may go better at the next attempt."""


def fetch(
    url: str,
    target: Path,
    *,
    headers: Mapping[str, str] = NO_HEADERS,
    digest: str | None = None,
    size: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Download a file, unless it is there; go on with what an interrupted run left.

    Args:
        url: where it is; redirects are followed.
        target: where it goes; the folder is made.
        headers: sent to the server of `url` only, not to where that one redirects.
        digest: 64 hexadecimal digits of its sha256, or 40 of the id that git gives it, for which `size` is needed.
        size: bytes; a file of unknown size is resumed within this call only.
        progress: called as bytes come, with the file's name in the URL.
    Raises:
        UnreachableError: no server, or no such file, or the connection broke again and again.
        CheckpointError: what came is not what was expected, and was deleted; or another process downloads it.
        OSError: the disk is full or cannot be written.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    name = urlsplit(url).path.rpartition("/")[2]
    with _claimed(part) as file:
        if size is None:
            file.truncate(0)  # small, and nobody could tell whether what is there is all
        _fill(file, url, headers, size, lambda done, total: progress(name, done, total) if progress else None)
        fault = _fault(file, digest, size)
        if fault:
            part.unlink()
            raise CheckpointError(
                f"{url}: {fault}; it was deleted: run again; if that does not help, the server has another file"
            )
        file.flush()
        os.fsync(file.fileno())
        part.rename(target)


def read_url(url: str, *, headers: Mapping[str, str] = NO_HEADERS) -> bytes:
    """A small file, into memory.

    Raises:
        UnreachableError: as `fetch`.
    """
    content = io.BytesIO()
    _fill(content, url, headers, None, lambda _done, _total: None)
    return content.getvalue()


@contextmanager
def _claimed(part: Path) -> Iterator[BinaryIO]:
    try:
        with part.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
    except BlockingIOError as error:
        raise CheckpointError(f"{part}: another process is downloading it; wait for it, and run again") from error
    except OSError as error:
        error.filename = error.filename or str(part)  # a full disk does not say where it is full
        raise


def _fill(
    file: BinaryIO, url: str, headers: Mapping[str, str], size: int | None, report: Callable[[int, int], None]
) -> None:
    """Append what is missing at the end of `file`, in as many attempts as it takes."""
    fruitless = 0
    while (start := file.seek(0, os.SEEK_END)) != size:
        if size is not None and start > size:
            file.truncate(0)
            continue
        try:
            with _open(url, headers, start) as response:
                if start and response.status != PARTIAL_CONTENT:  # all of it comes again
                    start = file.truncate(0)
                    file.seek(0)
                total = None if response.length is None else start + response.length
                for piece in _pieces(response):
                    file.write(piece)
                    report(file.tell(), total or size or file.tell())
            return
        except _BrokenOffError as error:
            if file.tell() != start:
                fruitless = 0
            fruitless += 1
            if fruitless == ATTEMPTS:
                raise UnreachableError(
                    f"{url}: {error}, {ATTEMPTS} times; run again to go on where it stopped"
                ) from error
            time.sleep(FIRST_PAUSE_S * 2 ** (fruitless - 1))


def _open(url: str, headers: Mapping[str, str], start: int) -> HTTPResponse:
    request = Request(url, headers={"User-Agent": f"gpt2-edge/{__version__}"})
    for name, value in headers.items():
        request.add_unredirected_header(name, value)  # a token is for this server, not for the one that stores files
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response: HTTPResponse = urlopen(request, timeout=TIMEOUT_S)
        return response
    except HTTPError as error:
        error.close()
        answer = f"HTTP {error.code} {error.reason}"
        if error.code in PASSING_STATUSES:
            raise _BrokenOffError(answer) from error
        raise UnreachableError(f"{url}: {answer}", error.code) from error
    except URLError as error:
        if isinstance(error.reason, ConnectionRefusedError | socket.gaierror | ssl.SSLCertVerificationError):
            raise UnreachableError(f"{url}: {error.reason.strerror or error.reason}") from error
        raise _BrokenOffError(str(error.reason)) from error
    except (OSError, HTTPException) as error:
        raise _BrokenOffError(str(error) or type(error).__name__) from error


def _pieces(response: HTTPResponse) -> Iterator[bytes]:
    """What the server sends, to its end; a connection that closes early is no end."""
    while True:
        try:
            piece = response.read(PIECE_BYTES)
        except (OSError, HTTPException) as error:
            raise _BrokenOffError(str(error) or type(error).__name__) from error
        if not piece:
            break
        yield piece
    if response.length:
        raise _BrokenOffError(f"the connection closed {response.length} bytes early")


def _fault(file: BinaryIO, digest: str | None, size: int | None) -> str | None:
    """Why these are not the bytes that were expected."""
    length = file.seek(0, os.SEEK_END)
    if size is not None and length != size:
        return f"{length} bytes came, expected {size}"
    if digest is None:
        return None
    is_sha256 = len(digest) == 64
    # git's id of a file: sha1 of "blob ", its length, a zero byte, its bytes.
    found = hashlib.sha256() if is_sha256 else hashlib.sha1(b"blob %d\0" % length, usedforsecurity=False)
    file.seek(0)
    while piece := file.read(PIECE_BYTES):
        found.update(piece)
    if found.hexdigest() == digest:
        return None
    return f"{'sha256' if is_sha256 else 'git id'} is {found.hexdigest()}, expected {digest}"
