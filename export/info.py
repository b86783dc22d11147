"""What a checkpoint is and what it would become, on one screen; of a package, what `runtime.info` tells.

    python -m export.info demo

Only headers are read, and the tokenizer; nothing is downloaded. A checkpoint that cannot be converted is described as
far as it can be read; the command then ends with what is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.command_line import CommandLineParser, run_command
from runtime.info import describe_config, print_report, show_package
from runtime.package import MANIFEST

from .checkpoint import Checkpoint, TensorsOnDisk, fit_vocabulary, read_checkpoint
from .checkpoint_files import StoredTensor
from .graph import check_supported
from .package_size import GRAPH_BYTES, conversion_peak_bytes, package_bytes
from .resolve import find_checkpoint
from .tokenizer_files import build_tokenizer


def show_checkpoint(path: Path, *, as_json: bool) -> int:
    """Print what a checkpoint is, and what it would become.

    Raises:
        CheckpointError: it cannot be read; all its faults are named.
        ConfigError, TokenizerError: once it is described, it cannot be converted.
    """
    checkpoint = read_checkpoint(path)
    report = {"checkpoint": str(path), "layout": checkpoint.layout}
    report |= describe_config(
        checkpoint.config, cache_bytes_per_token=4 * checkpoint.config.cache_items_per_token
    ) | _describe_storage(checkpoint)
    try:
        check_supported(checkpoint.config)
        report |= _describe_product(checkpoint)
    finally:
        print_report(report, as_json=as_json)
    return 0


def _describe_storage(checkpoint: Checkpoint) -> dict[str, Any]:
    assert isinstance(checkpoint.tensors, TensorsOnDisk)
    tensors = list(checkpoint.tensors.sources.values())
    stored = [tensor for tensor in tensors if isinstance(tensor, StoredTensor)]  # all but those read whole, or absent
    return {
        "tensors": len(tensors),
        "dtypes": dict(Counter(tensor.dtype for tensor in stored)),
        "weights_bytes": sum({tensor.path: tensor.file_size for tensor in stored}.values()),
    }


def _describe_product(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tokenizer, and the packages that could be made; a checkpoint without a tokenizer makes none."""
    tokenizer = build_tokenizer(checkpoint.folder, n_vocab=checkpoint.config.n_vocab)
    config = fit_vocabulary(checkpoint, tokenizer.get_vocab()).config
    tokenizer_bytes = len(tokenizer.to_str().encode("utf-8"))
    estimated = {
        precision: package_bytes(config, precision, tokenizer_bytes=tokenizer_bytes) for precision in GRAPH_BYTES
    }
    return {
        "tokenizer": {"tokens": tokenizer.get_vocab_size(), "bytes": tokenizer_bytes},
        "package_bytes": estimated,
        "conversion_peak_bytes": {
            precision: conversion_peak_bytes(config, size) for precision, size in estimated.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    return run_command(lambda: _show(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLineParser(
        prog="python -m export.info", description="Tell what a checkpoint is and would become, or what a package is."
    )
    parser.add_argument("checkpoint", help="a folder (a package's too), or a name as export.convert takes it")
    parser.add_argument("--models-dir", type=Path, default=Path("models"), metavar="DIR", help="default: models")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    return parser.parse_args(argv)


def _show(options: argparse.Namespace) -> int:
    path = find_checkpoint(options.checkpoint, options.models_dir, offline=True).path
    show = show_package if (path / MANIFEST).is_file() else show_checkpoint
    return show(path, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
