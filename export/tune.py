"""Which package is best here: each precision is converted, judged on a text, timed on this machine, and one is kept.

    python -m export.tune demo --text book.txt --bar kl=0.005 --slo itl_p50_ms=10 --prefer size

The user's limits choose (`--bar` as in `quantization.evaluate`, `--slo` as in `runtime.benchmark`), and among what
keeps them `--prefer`. All conversions are calibrated on text that the model writes: the text that judges them has no
part in making them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from quantization.bars import Bar, misses, read_bars
from quantization.datasets import read_text
from quantization.evaluate import MEASURED, MEASURED_AGAINST_REFERENCE
from quantization.perplexity import TextQuality, encode_text, judge_text
from quantization.quality_plot import check_plot_file, write_plot
from quantization.scored_package import Int64Array, ScoredPackage
from runtime.benchmark.engine import Placement
from runtime.benchmark.gates import Limit, parse_limits
from runtime.benchmark.report import Row
from runtime.benchmark.rounds import Contender, measure
from runtime.benchmark.workload import Workload
from runtime.command_line import CommandLineParser, ProgressLine, print_json, run_command, some_of, whole_number
from runtime.errors import RequestError, VerificationError
from runtime.package import CacheType, Precision, open_package
from runtime.processor import available_processors
from runtime.text_generator import TextGenerator

from .convert import convert
from .download import Progress
from .progress_bar import ProgressBar
from .publish import refuse_to_replace, staged
from .resolve import FoundCheckpoint, find_checkpoint

REFERENCE = "fp32"

RECIPES: Mapping[str, tuple[Precision, CacheType]] = {
    REFERENCE: ("fp32", "float32"),
    "int8": ("int8", "float32"),
    "int8-kv8": ("int8", "int8"),
    "int4": ("int4", "float32"),
    "int4-kv8": ("int4", "int8"),
}
"""What is tried: the name of a candidate -> what it is converted to."""

DEFAULT_BAR = "kl=0.02"

RUNS, LOADS, WARMUP = 6, 2, 1
"""Rounds of the benchmark: six that count, behind two loads of each package."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A package, what it is worth and what it takes."""

    name: str
    folder: Path
    quality: TextQuality
    speed: Row
    missed: tuple[str, ...]  # the user's limits that it does not keep, with its figures

    @property
    def kl(self) -> float:
        """Nats a token from the reference."""
        assert self.quality.kl is not None, "every candidate is held against the reference"
        return self.quality.kl

    @property
    def ms_per_token(self) -> float:
        assert self.speed.itl_ms is not None, "the workload writes several tokens"
        return self.speed.itl_ms.p50

    @property
    def costs(self) -> tuple[float, ...]:
        """What `PREFERENCES` names, in their order: the less of each, the better."""
        return tuple(cost(self) for cost in PREFERENCES.values())

    def to_dict(self, *, on_frontier: bool) -> dict[str, Any]:
        """The row for `--json` and `--plot`."""
        return {
            "package": self.name,
            "bytes": self.speed.disk_bytes,
            "tokens_per_s": self.speed.decode_tokens_per_s,
            "ttft_ms": self.speed.ttft_ms.p50,
            "ms_per_token": self.ms_per_token,
            "peak_rss_bytes": self.speed.peak_rss_bytes,
            **asdict(self.quality),
            "on_frontier": on_frontier,
            "missed": list(self.missed),
        }


PREFERENCES: Mapping[str, Callable[[Candidate], float]] = {
    "speed": lambda candidate: candidate.ms_per_token,
    "size": lambda candidate: candidate.speed.disk_bytes,
    "quality": lambda candidate: candidate.kl,
}
"""What the chosen package has the least of."""


def frontier(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats: as good in size, speed and quality, and better in one."""
    return [one for one in candidates if not any(_beats(other, one) for other in candidates)]


def _beats(one: Candidate, other: Candidate) -> bool:
    return one.costs != other.costs and all(a <= b for a, b in zip(one.costs, other.costs, strict=True))


def choose(candidates: Sequence[Candidate], prefer: str) -> Candidate | None:
    """The best of those that keep all limits; None where none does."""
    return min((one for one in candidates if not one.missed), key=PREFERENCES[prefer], default=None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    return run_command(lambda: _tune(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLineParser(
        prog="python -m export.tune",
        description="Convert to every precision, measure each here, and keep the best that your limits allow.",
    )
    parser.add_argument(
        "checkpoint", help="a folder, a file, a name under the models folder, a size, a Hugging Face id"
    )
    parser.add_argument(
        "--text", type=Path, required=True, metavar="FILE", help="UTF-8: what the packages are judged on"
    )
    parser.add_argument("--tokens", type=whole_number(1), metavar="N", help="the text's first N tokens; default: all")
    parser.add_argument(
        "--try",
        type=some_of("recipe", RECIPES),
        default=list(RECIPES),
        dest="names",
        metavar="NAME,..",
        help="default: all",
    )
    parser.add_argument(
        "--bar", default=DEFAULT_BAR, metavar="NAME=VALUE,..", help=f"quality to keep; default: {DEFAULT_BAR}"
    )
    parser.add_argument("--slo", metavar="NAME=VALUE,..", help="times and sizes to keep: itl_p50_ms=20")
    parser.add_argument(
        "--prefer", choices=list(PREFERENCES), default="speed", help="what counts among those that do; default: speed"
    )
    parser.add_argument(
        "--prompt-tokens", type=whole_number(1), default=128, metavar="N", help="of the timed prompt; default: 128"
    )
    parser.add_argument(
        "--new-tokens", type=whole_number(2), default=32, metavar="N", help="timed behind it; default: 32"
    )
    parser.add_argument("--threads", type=whole_number(1), metavar="N", help="default: the processors there are")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: packages/<name>-tuned")
    parser.add_argument("--models-dir", type=Path, default=Path("models"), metavar="DIR", help="default: models")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: beside the checkpoint")
    parser.add_argument("--offline", action="store_true", help="download nothing; so does HF_HUB_OFFLINE=1")
    parser.add_argument("--force", action="store_true", help="replace the package that is there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="quality against speed, .svg or .png")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    return parser.parse_args(argv)


def _tune(options: argparse.Namespace) -> int:
    if options.plot:
        check_plot_file(options.plot)
    bars = read_bars(options.bar, measured=MEASURED["text"] + MEASURED_AGAINST_REFERENCE)
    limits = parse_limits(options.slo) if options.slo else []
    unmeasured = [limit.name for limit in limits if limit.needs_timed_loads]
    if unmeasured:
        raise RequestError(f"--slo {unmeasured[0]}: loads are not timed here; python -m runtime.benchmark does")
    text = read_text(options.text)
    with ProgressBar() as bar:
        found = find_checkpoint(options.checkpoint, options.models_dir, offline=options.offline, progress=bar.show)
    output = options.output or Path("packages") / f"{PurePath(found.name).name}-tuned"
    refuse_to_replace(output, force=options.force)  # before work that takes long
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the chosen package is moved there, not copied.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.tuning-", dir=output.absolute().parent) as work:
        folders, qualities = _convert_and_judge(found, text, Path(work), options)
        speeds = _time({name: folders[name] for name in options.names}, options)
        candidates = [
            Candidate(name, folders[name], qualities[name], row, _missed(qualities[name], row, bars, limits))
            for name, row in speeds.items()
        ]
        chosen = choose(candidates, options.prefer)
        if chosen is not None:
            _publish(chosen.folder, output, force=options.force)
        _report(candidates, chosen, output, options)
    if chosen is None:
        raise VerificationError("no package keeps the limits, and none was written; move a limit")
    return 0


def _convert_and_judge(
    found: FoundCheckpoint, text: str, work: Path, options: argparse.Namespace
) -> tuple[dict[str, Path], dict[str, TextQuality]]:
    """The packages that are tried and the reference, and what each is worth."""
    with ProgressBar() as bar:
        folders = {REFERENCE: _convert(found, REFERENCE, work, options, bar.show)}
        ids = _ids_to_judge(folders[REFERENCE], text, options)
        for name in options.names:
            if name != REFERENCE:
                folders[name] = _convert(found, name, work, options, bar.show)
        return folders, _judge(folders, ids, options, bar.show)


def _convert(found: FoundCheckpoint, name: str, work: Path, options: argparse.Namespace, progress: Progress) -> Path:
    """Convert to a candidate; its folder."""
    precision, kv_cache = RECIPES[name]
    convert(
        found.path,
        work / name,
        name=found.name,
        precision=precision,
        tokenizer_dir=options.tokenizer,
        allow_loss=True,  # the user's bars decide
        kv_cache=kv_cache,
        progress=lambda what, done, total: progress(f"{name}: {what}", done, total),
    )
    return work / name


def _publish(folder: Path, output: Path, *, force: bool) -> None:
    with staged(output, force=force) as staging:
        for path in folder.iterdir():
            path.rename(staging / path.name)
        open_package(staging)


def _ids_to_judge(reference: Path, text: str, options: argparse.Namespace) -> Int64Array:
    """The tokens [T] of the text, once it is clear that text and timed prompt suit the model.

    Raises:
        RequestError: the text is too short, or the prompt too long.
    """
    generator = TextGenerator.load(reference)
    context = generator.config.n_ctx
    if options.prompt_tokens + options.new_tokens > context:
        raise RequestError(
            f"a prompt of {options.prompt_tokens} and {options.new_tokens} new tokens do not fit the model's context "
            f"of {context}; take fewer"
        )
    ids = encode_text(generator.tokenizer, text)
    least = options.tokens or context
    if len(ids) < least:
        raise RequestError(f"{options.text} has {len(ids):,} tokens, expected at least {least:,}; give a longer text")
    return ids[: options.tokens]


def _judge(
    folders: Mapping[str, Path], ids: Int64Array, options: argparse.Namespace, progress: Progress
) -> dict[str, TextQuality]:
    """What each package is worth on a text [T], in windows of the model's context, beside the first of them."""
    packages = [ScoredPackage(folder, threads=options.threads) for folder in folders.values()]
    reference = packages[0]
    window = reference.generator.config.n_ctx
    _, qualities = judge_text(packages, ids, window=window, stride=window, reference=reference, progress=progress)
    return dict(zip(folders, qualities, strict=True))


def _time(folders: Mapping[str, Path], options: argparse.Namespace) -> dict[str, Row]:
    """What each package takes, all in alternating rounds."""
    threads = options.threads or available_processors()
    contenders = [
        Contender(name, Placement(package=open_package(folder), threads=threads)) for name, folder in folders.items()
    ]
    workload = Workload(prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens, batch=1)
    with ProgressLine() as line:
        measured = measure(
            contenders, [workload], runs=RUNS, loads=LOADS, warmup=WARMUP, load_runs=0, progress=line.show
        )
    return {name: rows[0] for name, rows in zip(folders, measured.rows, strict=True)}


def _missed(quality: TextQuality, row: Row, bars: Sequence[Bar], limits: Sequence[Limit]) -> tuple[str, ...]:
    """The user's limits that a package does not keep, with its figures."""
    judgements = [limit.judge(row) for limit in limits]
    return (*misses(bars, asdict(quality)), *(each.figures for each in judgements if not each.kept))


def _report(
    candidates: Sequence[Candidate], chosen: Candidate | None, output: Path, options: argparse.Namespace
) -> None:
    best = frontier(candidates)
    rows = [candidate.to_dict(on_frontier=candidate in best) for candidate in candidates]
    if options.json:
        print_json({"chosen": chosen and chosen.name, "package": str(output) if chosen else None, "rows": rows})
    else:
        print(_table(rows))
        if chosen:
            print(f"{output}: {chosen.name}, the best in {options.prefer} of those that keep the limits")
    if options.plot:
        write_plot(options.plot, rows, title=options.text.name, speed="tokens/s while writing")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'':10}{'MB':>9}{'ms a token':>12}{'first token ms':>16}{'KL':>10}{'perplexity':>12}  "]
    for row in rows:
        lines.append(
            f"{row['package']:10}{row['bytes'] / 1e6:>9,.1f}{row['ms_per_token']:>12.2f}{row['ttft_ms']:>16.1f}"
            f"{row['kl']:>10.5f}{row['perplexity']:>12.3f}  {'frontier' if row['on_frontier'] else 'beaten'}"
            + (f"; missed: {'; '.join(row['missed'])}" if row["missed"] else "")
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
