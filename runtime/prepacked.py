"""Weights in the order in which this machine multiplies them, kept on disk: a package opens in less time.

onnxruntime rearranges ("prepacks") the matrices for the processor's instructions whenever a model is opened. Here it
does so once, and leaves the optimized graph and the rearranged weights in a folder of this machine's, from where they
are mapped into memory. Opt-in, since an entry takes twice the package's place: onnxruntime keeps the weights as they
were beside the rearranged ones.

An entry serves one package, one version of onnxruntime and one set of processor features, which its name is a digest
of: where one of them changes, another entry is made. Nothing deletes the old one; all of it can be deleted at any time.
An entry whose files have other sizes than when it was made is made anew; bytes that changed in place are not noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from .errors import MachineError, PackageError
from .package import Package, read_manifest
from .processor import processor_features
from .session import open_session, save_optimized
from .wheel import load_onnxruntime

MODEL = "model.onnx"
SIZES = "sizes.json"
"""Written last: the bytes of every other file."""

UNFINISHED = ".unfinished"
ABANDONED_AFTER_S = 3600
"""An unfinished entry this old was left by a process that was killed."""


def prepacked_model(package: Package, folder: Path) -> Path:
    """The graph to open in place of the package's own, made now unless it is there and whole.

    Args:
        package: what to open.
        folder: where entries are kept; made if it is not there.
    Returns:
        The .onnx file, for `session.open_session(..., optimized=True)`.
    Raises:
        MachineError: the entry cannot be made.
    """
    entry = folder / f"{package.folder.resolve().name}-{_key(package)}"
    if not _is_whole(entry):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder)
            _make(package, entry)
        except (OSError, PackageError) as error:
            raise MachineError(
                f"{entry}: prepacked weights cannot be made ({getattr(error, 'strerror', None) or error}); free space, "
                "name another folder, or open the package without"
            ) from error
    return entry / MODEL


def _key(package: Package) -> str:
    """What decides how the weights are arranged."""
    features = processor_features()
    processor = platform.processor() if features is None else " ".join(sorted(features))
    files = package.manifest.files.items()
    graph = [entry.sha256 for name, entry in files if (package.folder / name).parent == package.model_path.parent]
    told = json.dumps([graph, load_onnxruntime().__version__, platform.machine(), processor])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _is_whole(entry: Path) -> bool:
    try:
        sizes = json.loads((entry / SIZES).read_text(encoding="utf-8"))
        return bool(sizes) and all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _remove_abandoned(folder: Path) -> None:
    for left in folder.iterdir():
        if left.name.startswith(".") and left.suffix == UNFINISHED:
            with suppress(FileNotFoundError):  # it was finished meanwhile
                if time.time() - left.stat().st_mtime > ABANDONED_AFTER_S:
                    shutil.rmtree(left, ignore_errors=True)


def _make(package: Package, entry: Path) -> None:
    """Write an entry beside its place and move it there; where another process was faster, its entry stays."""
    unfinished = entry.with_name(f".{entry.name}.{os.getpid()}-{secrets.token_hex(4)}{UNFINISHED}")
    unfinished.mkdir()
    try:
        save_optimized(package.model_path, unfinished / MODEL)
        open_session(unfinished / MODEL, optimized=True)  # onnxruntime does not say that a disk was full meanwhile
        if read_manifest(package.folder) != package.manifest:
            raise PackageError(f"{package.folder} was replaced while it was opened")
        sizes = {path.name: path.stat().st_size for path in unfinished.iterdir()}
        (unfinished / SIZES).write_text(json.dumps(sizes), encoding="utf-8")
        try:
            unfinished.rename(entry)
        except OSError:
            if _is_whole(entry):
                return
            damaged = unfinished.with_name(f"{unfinished.stem}-damaged{UNFINISHED}")
            entry.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
            unfinished.rename(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
