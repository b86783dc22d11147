"""Build ahead what a device would build at the first load: for TensorRT its engine, which takes minutes.

    python -m runtime.prepare PACKAGE --device tensorrt

Unverified: TensorRT was never at hand, so of all this only the refusals have run.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .command_line import CommandLineParser, print_json, run_command
from .package import Package, open_package
from .place import Place
from .session import open_session
from .tensorrt_options import default_cache_dir, engine_folder_here, tensorrt_options
from .text_generator import check_runs_here

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
    place = check_runs_here(package, Place("tensorrt"))
    folder = engine_folder_here(package.manifest, place, cache_dir)
    with _reports(report):
        open_session(package.model_path, place=place, provider_settings=tensorrt_options(package.manifest, folder))
    return folder


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
