"""Is it OpenAI's model? A size, converted and judged, beside the paper's own figures.

    scripts/prove 124M wikitext2=wiki.test.raw lambada=lambada_test.jsonl [--precision fp32,int8] [--offline]

Downloads the checkpoint if it is not here, converts it at each precision unless the package is there, and judges it
on each NAME=FILE, the names being those of quantization.evaluate's --dataset. Not a gate: how the paper wrote its
texts, and what it counted, is known in part only (quantization/paper.py, quantization/lambada.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import export.convert
import quantization.evaluate
from export.package_size import GRAPH_BYTES
from quantization.paper import PUBLISHED
from runtime.command_line import CommandLineParser
from runtime.config import OFFICIAL_SIZES


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    folders = [options.packages / f"{options.size}-{precision}" for precision in options.precision]
    for folder, precision in zip(folders, options.precision, strict=True):
        if not folder.exists():
            arguments = [options.size, "--precision", precision, "--output", str(folder)]
            status = export.convert.main([*arguments, *(["--offline"] if options.offline else [])])
            if status:
                return status
    for name, file in options.files:
        print(f"\n{options.size} on {name}", flush=True)
        judged = [*map(str, folders), f"--{PUBLISHED[name].task}", str(file), "--dataset", name]
        status = quantization.evaluate.main(judged)
        if status:
            return status
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLineParser(prog="scripts/prove", description="Hold an official size against the paper's figures.")
    parser.add_argument("size", choices=list(OFFICIAL_SIZES))
    parser.add_argument("files", nargs="+", type=_named_file, metavar="NAME=FILE", help=f"{', '.join(PUBLISHED)}")
    parser.add_argument("--precision", type=_precisions, default=list(GRAPH_BYTES), help="default: all")
    parser.add_argument("--packages", type=Path, default=Path("packages"), metavar="DIR", help="default: packages")
    parser.add_argument("--offline", action="store_true", help="download nothing")
    return parser.parse_args(argv)


def _named_file(text: str) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    if name not in PUBLISHED:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=FILE, the name one of {', '.join(PUBLISHED)}")
    if not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{name}: no such file: {file}")
    return name, Path(file)


def _precisions(text: str) -> list[str]:
    named = text.split(",")
    if not set(named) <= set(GRAPH_BYTES):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(GRAPH_BYTES)}, separated by commas")
    return named


if __name__ == "__main__":
    sys.exit(main())
