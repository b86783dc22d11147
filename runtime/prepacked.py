"""Weights in the order in which this machine multiplies them, kept on disk: a package opens in less time and memory.

onnxruntime rearranges ("prepacks") the matrices for the processor's instructions whenever a model is opened. Here it
does so once, and leaves the optimized graph and the rearranged weights in a folder of this machine's, from where they
are mapped into memory. Opt-in, since an entry takes twice the package's place: onnxruntime keeps the weights as they
were beside the rearranged ones.

An entry serves one package, one version of onnxruntime and one set of processor features, which its name is a digest
of: where one of them changes, another entry is made. Nothing deletes the old one; all of it can be deleted at any time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import platform
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from .errors import MachineError
from .package import Package, file_entry
from .session import load_onnxruntime, processor_features, save_optimized

MODEL = "model.onnx"
SIZES = "sizes.json"
"""Written last: the bytes of every other file."""

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
        PackageError: onnxruntime refuses the package's graph.
        MachineError: the entry cannot be written.
    """
    entry = folder / f"{package.folder.resolve().name}-{_key(package)}"
    if not _is_whole(entry):
        try:
            _make(package, entry)
        except OSError as error:
            raise MachineError(
                f"{entry}: prepacked weights cannot be written ({error.strerror or error}); free space, or name "
                "another folder"
            ) from error
    return entry / MODEL


def _key(package: Package) -> str:
    """What decides how the weights are arranged."""
    features = processor_features()
    processor = platform.processor() if features is None else " ".join(sorted(features))
    manifest = file_entry(package.folder / "manifest.json").sha256  # which holds the digest of every file
    told = json.dumps([manifest, load_onnxruntime().__version__, platform.machine(), processor])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _is_whole(entry: Path) -> bool:
    try:
        sizes = json.loads((entry / SIZES).read_text(encoding="utf-8"))
        return bool(sizes) and all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _make(package: Package, entry: Path) -> None:
    """Write an entry beside its place and move it there; where another process was faster, its entry stays."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    for left in entry.parent.glob(f".{entry.name}.*"):
        if time.time() - left.stat().st_mtime > ABANDONED_AFTER_S:
            shutil.rmtree(left, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        save_optimized(package.model_path, unfinished / MODEL)
        sizes = {path.name: path.stat().st_size for path in unfinished.iterdir()}
        (unfinished / SIZES).write_text(json.dumps(sizes), encoding="utf-8")
        with suppress(FileNotFoundError):
            if not _is_whole(entry):
                shutil.rmtree(entry)  # damaged
        try:
            unfinished.rename(entry)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
