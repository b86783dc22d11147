"""What a package is worth: how well it predicts, how far it is from a reference, and what it takes.

    python -m quantization.evaluate packages/demo-int8 --reference packages/demo-fp32 --text wiki.test.raw

This is the story; read it top-down. The definitions stand where the figures are computed: `perplexity` for --text,
`lambada` for --lambada, `childrens_book` for --cbt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np

import runtime
from runtime.activations import NARROW
from runtime.benchmark.machine import processor_name
from runtime.command_line import CommandLineParser, print_json, run_command
from runtime.errors import RequestError
from runtime.needs import activations_here
from runtime.package import file_entry, open_package, read_manifest
from runtime.processor import available_processors
from runtime.wheel import load_onnxruntime

from .bars import check_bars, read_bars
from .childrens_book import score_childrens_book
from .datasets import read_childrens_book, read_lambada, read_text
from .lambada import score_lambada
from .paper import PUBLISHED, Task, published_figures
from .perplexity import encode_text, judge_text
from .quality_plot import check_plot_file, write_plot
from .quality_report import Row, report
from .scored_package import Int64Array, Progress, ScoredPackage

MEASURED = {
    "text": ("perplexity", "bits_per_byte"),
    "lambada": ("perplexity", "accuracy", "last_token_accuracy"),
    "cbt": ("accuracy",),
}
"""What can be a bar; a reference adds the next."""

MEASURED_AGAINST_REFERENCE = ("kl", "top1", "top5", "perplexity_change")

Score = Callable[[ScoredPackage], dict[str, Any]]
"""What a package reaches on a file, by the names of the figures."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    return run_command(lambda: _evaluate(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLineParser(
        prog="python -m quantization.evaluate",
        description="Judge packages on a text, on LAMBADA or on the Children's Book Test; exit status 3 below a bar.",
    )
    parser.add_argument("package", nargs="+", type=Path, help="folders that export.convert wrote")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--text", type=Path, metavar="FILE", help="UTF-8: perplexity")
    task.add_argument("--lambada", type=Path, metavar="FILE", help="JSON lines, as OpenAI published: the last word")
    task.add_argument("--cbt", type=Path, metavar="FILE", help="the Children's Book Test: the missing word")
    parser.add_argument("--reference", type=Path, metavar="PACKAGE", help="with --text: how far from this one")
    parser.add_argument("--window", type=int, metavar="N", help="tokens run together; default: the model's context")
    parser.add_argument("--stride", type=int, metavar="N", help="from one window to the next; default: the window")
    parser.add_argument("--tokens", type=int, metavar="N", help="the text's first N tokens; default: all")
    parser.add_argument(
        "--dataset", choices=list(PUBLISHED), help="what FILE is: shows the paper's figures beside ours"
    )
    parser.add_argument("--bar", metavar="NAME=VALUE,...", help="what each package must reach: kl=0.001,top1=0.97")
    parser.add_argument("--threads", type=int, metavar="N", help="default: the processors this process may use")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="quality against speed, .svg or .png")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    options = parser.parse_args(argv)
    options.task = next(name for name in get_args(Task) if getattr(options, name) is not None)
    options.file = getattr(options, options.task)
    if options.task != "text":
        for name in ("reference", "window", "stride", "tokens"):
            if getattr(options, name) is not None:
                parser.error(f"--{name} goes with --text, not with --{options.task}")
    if options.dataset and PUBLISHED[options.dataset].task != options.task:
        parser.error(f"--dataset {options.dataset} goes with --{PUBLISHED[options.dataset].task}")
    return options


def _evaluate(options: argparse.Namespace) -> int:
    if options.plot:
        check_plot_file(options.plot)
    measured = MEASURED[options.task] + (MEASURED_AGAINST_REFERENCE if options.reference else ())
    bars = read_bars(options.bar, measured=measured) if options.bar is not None else []
    folders = _folders(options)
    if options.task == "text":
        options.window, options.stride = _window_and_stride(folders, options)
    judge = _judge_text if options.task == "text" else _judge_words
    rows = list(judge(folders, options))
    receipt = _receipt(options)
    if options.json:
        print_json({"rows": rows, "receipt": receipt})
    else:
        print(report(rows, receipt))
    if options.plot:  # behind the figures, which a full disk must not cost
        write_plot(options.plot, rows, title=options.file.name)
    check_bars(bars, [row for row in rows if not row["is_reference"]])
    return 0


def _window_and_stride(folders: Sequence[Path], options: argparse.Namespace) -> tuple[int, int]:
    """What was asked for, or the narrowest context in one step.

    Raises:
        RequestError: a window is longer than a context.
        PackageError: a folder is no package, or damaged.
    """
    contexts = {folder: open_package(folder).manifest.config.n_ctx for folder in folders}
    narrowest = min(folders, key=contexts.__getitem__)
    window = contexts[narrowest] if options.window is None else options.window
    if window > contexts[narrowest]:
        raise RequestError(
            f"a window of {window} tokens does not fit the context of {narrowest}, which has {contexts[narrowest]}; "
            "take a smaller --window"
        )
    return window, window if options.stride is None else options.stride


def _judge_text(folders: Sequence[Path], options: argparse.Namespace) -> Iterator[Row]:
    """Side by side with a reference, which is the first folder; else one after the other, in less memory."""
    text = read_text(options.text)
    for together in [folders] if options.reference else [[folder] for folder in folders]:
        yield from _judge_together(together, text, options)


def _judge_together(folders: Sequence[Path], text: str, options: argparse.Namespace) -> Iterator[Row]:
    packages = [ScoredPackage(folder, threads=options.threads) for folder in folders]
    ids = _ids_in_common(packages, text)
    if options.tokens is not None:
        if options.tokens > len(ids):
            raise RequestError(f"{options.text} has {len(ids):,} tokens, --tokens asks for {options.tokens:,}")
        ids = ids[: max(0, options.tokens)]
    reference = packages[0] if options.reference else None
    scored, qualities = judge_text(
        packages, ids, window=options.window, stride=options.stride, reference=reference, progress=_progress()
    )
    for package, quality in zip(packages, qualities, strict=True):
        yield _row(package, asdict(scored) | asdict(quality), options, is_reference=package is reference)


def _ids_in_common(packages: Sequence[ScoredPackage], text: str) -> Int64Array:
    """The text's tokens, which must be the same to all packages, as must be the tokens that they choose from.

    Raises:
        RequestError: they are not.
    """
    first, *others = packages
    ids = encode_text(first.generator.tokenizer, text)
    for other in others:
        if not _same_tokens(first, other) or not np.array_equal(ids, encode_text(other.generator.tokenizer, text)):
            raise RequestError(
                f"{other.folder} has another tokenizer or vocabulary than the reference, {first.folder}, and so their "
                "predictions cannot be compared; judge it without --reference, by its bits per byte"
            )
    return ids


def _same_tokens(first: ScoredPackage, other: ScoredPackage) -> bool:
    ours, theirs = first.generator, other.generator
    sizes = (ours.config.n_vocab, ours.tokenizer.n_vocab), (theirs.config.n_vocab, theirs.tokenizer.n_vocab)
    return sizes[0] == sizes[1] and all(
        ours.tokenizer.token_bytes(token_id) == theirs.tokenizer.token_bytes(token_id)
        for token_id in range(ours.tokenizer.n_vocab)
    )


def _judge_words(folders: Sequence[Path], options: argparse.Namespace) -> Iterator[Row]:
    """LAMBADA or the Children's Book Test, one package after the other."""
    score = {"lambada": _lambada, "cbt": _childrens_book}[options.task](options.file)
    for folder in folders:
        open_package(folder)  # before the first is run: the last may come hours later
    for folder in folders:
        yield _judge_alone(folder, score, options)


def _judge_alone(folder: Path, score: Score, options: argparse.Namespace) -> Row:
    package = ScoredPackage(folder, threads=options.threads)
    return _row(package, score(package), options)


def _lambada(file: Path) -> Score:
    passages = read_lambada(file)
    return lambda package: asdict(score_lambada(package, passages, progress=_progress()))


def _childrens_book(file: Path) -> Score:
    questions = read_childrens_book(file)
    return lambda package: asdict(score_childrens_book(package, questions, progress=_progress()))


def _row(
    package: ScoredPackage, quality: dict[str, Any], options: argparse.Namespace, *, is_reference: bool = False
) -> Row:
    return {
        "package": str(package.folder),
        "precision": package.manifest.precision,
        "is_reference": is_reference,
        **quality,
        **asdict(package.cost(alone=len(_folders(options)) == 1)),
        "paper": published_figures(options.dataset, package.manifest.config) if options.dataset else None,
    }


def _folders(options: argparse.Namespace) -> list[Path]:
    """Every package once, the reference first."""
    return list(dict.fromkeys([*([options.reference] if options.reference else []), *options.package]))


def _receipt(options: argparse.Namespace) -> dict[str, Any]:
    """What else someone needs to measure the same."""
    return {
        "task": options.task,
        "file": str(options.file),
        "sha256": file_entry(options.file).sha256,
        "dataset": options.dataset,
        "window": options.window,
        "stride": options.stride,
        "threads": available_processors() if options.threads is None else options.threads,
        "processor": processor_name(),
        "gpt2_edge": runtime.__version__,
        "onnxruntime": load_onnxruntime().__version__,
        "narrow_activations": [
            str(folder) for folder in _folders(options) if activations_here(read_manifest(folder).needs) == NARROW
        ],
        "numpy": version("numpy"),
    }


def _progress() -> Progress:
    """One line on stderr that whatever comes next is written over; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        return lambda _what, _done, _total: None

    def show(what: str, done: int, total: int) -> None:
        line = f"{what} {done:,} of {total:,}"
        print(line if done < total else " " * len(line), end="\r", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
