"""Nothing half written: a package is made in a folder beside its place, and takes that place in one step.

    .NAME.partial    where a conversion writes, claimed by a lock that ends with its process
    .NAME.old        where a file system cannot exchange two names: the old package, for the blink between two renames

Whatever a killed conversion left, the next one to the same place finds and clears. The parent folder's lock is held
for moments only, so conversions to other places go on.

What a reader sees meanwhile: the name always leads to a whole package (but for that blink), the old one or the new one.
A reader opens files one by one, though, and the exchange may come in between. Then it holds an old manifest against new
files: `open_package` refuses them as altered, `open_decoder` reads the manifest once more when the graph is open and
refuses another one, and opening again succeeds. A reader that has loaded keeps what it has.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import PackageError
from runtime.package import MANIFEST

AT_FDCWD = -100
RENAME_EXCHANGE = 2
"""Linux, renameat2(2): both names exist, and each takes the other's place atomically."""


@contextmanager
def staged(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A folder to write a package in; it becomes `target` when the block ends, and is removed if the block raises.

    Args:
        target: the package's place.
        force: replace the package that is there.
    Yields:
        An empty folder on the same file system.
    Raises:
        PackageError: the target exists and `force` is not given, or is no package, or is a link, or another conversion
            writes it.
        OSError: the disk is full, or the parent folder cannot be written.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.partial"
    with _locked_folder(target.parent):
        _recover(target)
        refuse_to_replace(target, force=force)
        claim = _claim(staging, target)
    try:
        yield staging
        _write_through(staging)
        with _locked_folder(target.parent):
            refuse_to_replace(target, force=force)
            _put_in_place(staging, target)
    except BaseException:
        with _locked_folder(target.parent):
            _remove_claimed(staging, claim)
        raise
    finally:
        os.close(claim)


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _claim(staging: Path, target: Path) -> int:
    """Make the staging folder ours, empty; the returned descriptor holds the claim until it is closed."""
    staging.mkdir(exist_ok=True)
    descriptor = os.open(staging, os.O_RDONLY | os.O_NOFOLLOW)  # what a link leads to is not ours to clear
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left_over in staging.iterdir():
            shutil.rmtree(left_over) if left_over.is_dir() and not left_over.is_symlink() else left_over.unlink()
    except BlockingIOError as error:
        os.close(descriptor)
        raise PackageError(
            f"{target}: another conversion is writing it; wait for it, or name another --output"
        ) from error
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_claimed(staging: Path, claim: int) -> None:
    """Remove the staging folder, unless the name has gone over to another conversion or to the old package."""
    if staging.is_dir() and os.path.samestat(staging.stat(), os.fstat(claim)):
        shutil.rmtree(staging, ignore_errors=True)


def refuse_to_replace(target: Path, *, force: bool) -> None:
    """Refuse a place that holds something else than a package, or a package that is not to be replaced.

    Raises:
        PackageError: it does.
    """
    if not os.path.lexists(target):
        return
    if target.is_symlink():
        raise PackageError(f"{target} is a link and was kept; name the folder that it leads to, {target.readlink()}")
    if not force:
        raise PackageError(f"{target} exists and was kept; replace it with --force, or name another --output")
    if not _is_package(target) and not (target.is_dir() and not any(target.iterdir())):
        raise PackageError(f"{target} is no package and was kept, --force or not; name another --output")


def _is_package(folder: Path) -> bool:
    """Whether a manifest of any format version lies there; web applications have a manifest.json too."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "format_version" in manifest


def _put_in_place(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
    elif _exchange(staging, target):
        shutil.rmtree(staging, ignore_errors=True)  # the old package
    else:
        old = _old_name(target)
        target.rename(old)
        try:
            staging.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def _recover(target: Path) -> None:
    """Finish what a conversion that was killed between its two renames began."""
    old = _old_name(target)
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)


def _old_name(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    done: int = renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return done == 0


def _write_through(folder: Path) -> None:
    """Have the disk hold every byte before the name says that it does: a power cut must not leave an empty package."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
