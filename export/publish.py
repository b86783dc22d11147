"""Nothing half written: a package is made in a folder beside its place, and takes that place in one step.

    .NAME.partial    where a conversion writes, claimed by a lock that ends with its process
    .NAME.old        where a file system cannot exchange two names: the old package, for the blink between two renames

Whatever a killed conversion left, the next one to the same place finds and clears. The parent folder's lock is held
for moments only, so conversions to other places go on.
"""

from __future__ import annotations

import ctypes
import fcntl
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
        PackageError: the target exists and `force` is not given, or is no package, or another conversion writes it.
        OSError: the disk is full, or the parent folder cannot be written.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.partial")
    with _locked_folder(target.parent):
        _recover(target)
        _refuse_to_replace(target, force)
        claim = _claim(staging, target)
    try:
        yield staging
        _write_through(staging)
        with _locked_folder(target.parent):
            _refuse_to_replace(target, force)
            _put_in_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
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
    descriptor = os.open(staging, os.O_RDONLY)
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


def _refuse_to_replace(target: Path, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if not force:
        raise PackageError(f"{target} exists and was kept; replace it with --force, or name another --output")
    if not (target / MANIFEST).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise PackageError(f"{target} is no package and was kept, --force or not; name another --output")


def _put_in_place(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
    elif _exchange(staging, target):
        shutil.rmtree(staging, ignore_errors=True)  # the old package
    else:
        old = _old_name(target)
        target.rename(old)
        staging.rename(target)
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
    return target.with_name(f".{target.name}.old")


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
