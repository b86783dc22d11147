"""Build ahead what a device would build at the first load: for TensorRT its engine, which takes minutes.

    python -m runtime.prepare PACKAGE --device tensorrt

Unverified: TensorRT was never at hand, so of all this only the refusals have run.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .command_line import CommandLineParser, print_json, run_command
from .errors import DeviceError, MachineError
from .package import Package, open_package
from .session import open_session
from .tensorrt_options import engine_folder, tensorrt_options
from .text_generator import check_runs_here

logger = logging.getLogger(__name__)

NVINFER = "libnvinfer.so.10"
"""TensorRT's library, of the major version that onnxruntime-gpu 1.31 is built for."""

DRIVER = "libcuda.so.1"
SECONDS_PER_REPORT = 5.0


def prepare(package: Package, cache_dir: Path, report: Callable[[str], None]) -> Path:
    """Have TensorRT compile a package's graph, or find that it has.

    Args:
        package: one that was made for TensorRT.
        cache_dir: where engines of all packages are kept.
        report: called with a line of text as time passes.
    Returns:
        The folder of the engine.
    Raises:
        DeviceError: the package is for another device, or TensorRT or the driver is missing, by name.
        MachineError: the folder cannot be written.
    """
    check_runs_here(package, device="tensorrt")
    folder = engine_folder(package.manifest, cache_dir, tensorrt_version=tensorrt_version(), gpu=gpu_name())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be made ({error.strerror}); name another place by --cache-dir") from error
    with _reports(report):
        open_engine(package, folder)
    return folder


def open_engine(package: Package, folder: Path) -> None:
    """Open a session, which builds the engine if the folder has none."""
    logger.info("TensorRT options: %s", tensorrt_options(package.manifest, folder))
    open_session(package.model_path, device="tensorrt")


def tensorrt_version() -> str:
    """As 10.13.3.

    Raises:
        DeviceError: TensorRT 10 is not installed.
    Source: NvInferRuntimeBase.h: getInferLibVersion() is 10000 major + 100 minor + patch since TensorRT 10.
    """
    try:
        library = ctypes.CDLL(NVINFER)
    except OSError as error:
        raise DeviceError(
            f"TensorRT 10 is not installed ({NVINFER} does not load); install it with: pip install 'tensorrt-cu13<11'"
        ) from error
    number = int(library.getInferLibVersion())
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def gpu_name() -> str:
    """What the driver calls the first GPU.

    Raises:
        DeviceError: there is no driver, or it shows no GPU.
    Source: CUDA driver API, device management.
    """
    try:
        library = ctypes.CDLL(DRIVER)
    except OSError as error:
        raise DeviceError(f"NVIDIA's driver is not installed ({DRIVER} does not load); install it") from error
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if library.cuInit(0) or library.cuDeviceGet(ctypes.byref(device), 0):
        raise DeviceError("NVIDIA's driver shows no GPU; see what nvidia-smi says, and mend that")
    library.cuDeviceGetName(name, len(name), device)
    return name.value.decode(errors="replace")


def default_cache_dir() -> Path:
    """Where a user's caches are kept, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2-edge"


@contextmanager
def _reports(report: Callable[[str], None]) -> Iterator[None]:
    """Say how long the block has taken: TensorRT itself tells nothing until it is done."""
    started, done = time.monotonic(), threading.Event()

    def watch() -> None:
        while not done.wait(SECONDS_PER_REPORT):
            report(f"TensorRT is building the engine: {time.monotonic() - started:.0f} s")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    return run_command(lambda: _prepare(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLineParser(
        prog="python -m runtime.prepare", description="Build a package's TensorRT engine ahead of its first use."
    )
    parser.add_argument("package", type=Path, help="a folder that export.convert --device tensorrt made")
    parser.add_argument("--device", choices=["tensorrt"], required=True)
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="default: gpt2-edge in the user's cache folder")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    return parser.parse_args(argv)


def _prepare(options: argparse.Namespace) -> int:
    package = open_package(options.package)
    started = time.monotonic()
    folder = prepare(
        package, options.cache_dir or default_cache_dir(), lambda line: print(line, file=sys.stderr, flush=True)
    )
    seconds = time.monotonic() - started
    if options.json:
        print_json({"engine": str(folder), "seconds": round(seconds, 2)})
    else:
        print(f"{folder}: ready after {seconds:.1f} s; runtime.generate --device tensorrt finds it there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
