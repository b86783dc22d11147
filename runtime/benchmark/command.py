"""The command line of the benchmark: what is asked, in which order, and what is printed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..command_line import (
    CommandLineParser,
    ProgressLine,
    add_device,
    print_json,
    run_command,
    whole_number,
    whole_numbers,
)
from ..errors import PackageError, RequestError, VerificationError
from ..package import MANIFEST, Package, open_package
from ..processor import available_processors
from ..session import checked_threads
from ..text_generator import check_runs_here
from .comparison import (
    FEWEST_ROUNDS,
    LOADS,
    TOLERANCE,
    Comparison,
    check_report,
    compare_packages,
    compare_with_report,
    read_report,
)
from .engine import Placement
from .gates import Limit, parse_limits
from .limits import Prediction
from .plot import check_plot_file, write_plot
from .report import Row, csv_text, markdown, receipt_line, table
from .rounds import Contender, Measured, measure
from .timing import DEFINITIONS
from .workload import Workload

RUNS, RUNS_OF_A_COMPARISON = 6, 2 * LOADS
LOADS_OF_A_SWEEP = 3
"""One after the other: see `rounds.measure`."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    return run_command(lambda: _benchmark(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLineParser(
        prog="python -m runtime.benchmark",
        description="Measure how fast packages are on this machine. Several run in alternating rounds, each in a "
        "process of its own. Lists are separated by commas.",
    )
    add = parser.add_argument
    add("packages", nargs="*", metavar="PACKAGE", help="folder that export.convert wrote")
    add(
        "--prompt-tokens",
        type=whole_numbers,
        default=[128],
        metavar="N,..",
        help="lengths of random prompts; default 128",
    )
    add("--prompts", type=Path, metavar="FILE", help="instead: prompts of your own, one on each line")
    add("--new-tokens", type=whole_numbers, default=[32], metavar="N,..", help="tokens to write; default 32")
    add("--batch", type=whole_numbers, default=[1], metavar="N,..", help="prompts that run together; default 1")
    add("--threads", type=whole_numbers, metavar="N,..", help="default: the processors this process may use")
    add_device(parser)
    add(
        "--runs",
        type=whole_number(1),
        metavar="N",
        help=f"default {RUNS}, with a package as baseline {RUNS_OF_A_COMPARISON}",
    )
    add("--warmup", type=whole_number(0), default=1, metavar="N", help="rounds that are discarded first; default 1")
    add(
        "--load-runs",
        type=whole_number(0),
        default=3,
        metavar="N",
        help="warm loads, behind a cold one; 0 for none; default 3",
    )
    add("--predict", type=whole_numbers, default=[], metavar="N,..", help="decode time behind so many tokens, not run")
    add("--slo", metavar="LIMITS", help="as ttft_p95_ms=500,itl_p99_ms=60; exit status 3 if a row misses one")
    add(
        "--baseline",
        type=Path,
        metavar="PACKAGE|FILE",
        help="exit status 3 if slower than it: a package that runs in the same rounds, or a report that --json wrote",
    )
    add(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="SHARE",
        help=f"slower by less is not; default {TOLERANCE}",
    )
    add("--other-machine", action="store_true", help="compare with a report of other hardware, with wide limits")
    add(
        "--prepacked-dir",
        type=Path,
        metavar="DIR",
        help="open the packages from weights that are kept there as this processor multiplies them",
    )
    add("--csv", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="FILE", help="a picture, .svg or .png; needs the extra plot")
    add("--json", action="store_true", help="one JSON object on stdout, nothing else")
    add("--explain", action="store_true", help="what each figure means, and nothing else")
    options = parser.parse_args(argv)
    if not options.packages and not options.explain:
        parser.error("name at least one PACKAGE")
    if options.other_machine and (options.baseline is None or options.baseline.is_dir()):
        parser.error("--other-machine goes with --baseline FILE")
    if not 0 <= options.tolerance < 1:
        parser.error(f"--tolerance {options.tolerance} is no share from 0 to 1")
    return options


@dataclass(frozen=True, slots=True)
class _Plan:
    """What was asked, checked: nothing of it can fail for bad usage once the machine is at work."""

    contenders: list[Contender]
    baselines: list[Contender]  # one for each contender, or none
    workloads: list[Workload]
    limits: list[Limit]
    report: dict[str, Any] | None  # an earlier one, as baseline
    runs: int


def _benchmark(options: argparse.Namespace) -> int:
    if options.explain:
        print(DEFINITIONS, end="")
        return 0
    plan = _plan(options)
    with ProgressLine() as line:
        measured = measure(
            plan.contenders + plan.baselines,
            plan.workloads,
            runs=plan.runs,
            loads=min(plan.runs, LOADS if plan.baselines else LOADS_OF_A_SWEEP),
            warmup=options.warmup,
            load_runs=options.load_runs,
            progress=line.show,
        )
    n_contenders = len(plan.contenders)
    rows = [row for per_contender in measured.rows[:n_contenders] for row in per_contender]
    baseline_rows = [row for per_contender in measured.rows[n_contenders:] for row in per_contender]
    predictions = _predictions(plan, measured, options)
    comparisons = _comparisons(plan, rows, baseline_rows, measured, options)
    judgements = [limit.judge(row) for limit in plan.limits for row in rows]
    result = {
        "rows": [asdict(row) for row in rows],
        "baseline_rows": [asdict(row) for row in baseline_rows],
        "predictions": [{"package": name, "threads": threads, **asdict(each)} for name, threads, each in predictions],
        "comparisons": [{**asdict(each), "verdict": each.verdict} for each in comparisons],
        "limits": [
            {
                "name": each.limit.name,
                "limit": each.limit.value,
                "package": each.row.package,
                "case": each.row.case,
                "value": each.value,
                "kept": each.kept,
            }
            for each in judgements
        ],
        "receipt": measured.receipt,
    }
    if options.json:
        print_json(result)
    else:
        _print(rows + baseline_rows, measured.receipt, predictions, comparisons)
    _write_files(rows + baseline_rows, measured, plan, options)
    for judgement in judgements:
        if doubt := judgement.limit.doubt(judgement.row):
            print(f"warning: {doubt}", file=sys.stderr)
    missed = [str(judgement) for judgement in judgements if not judgement.kept]
    missed += [str(comparison) for comparison in comparisons if comparison.verdict == "slower"]
    if missed:
        raise VerificationError("; ".join(missed))
    return 0


def _plan(options: argparse.Namespace) -> _Plan:
    """Open the packages and check that all that was asked can be done.

    Raises:
        PackageError: a folder is no package.
        DeviceError: a package does not run here.
        RequestError: a size beyond a context, a limit that is not known, a baseline that is none, too few runs.
    """
    packages = [open_package(folder) for folder in options.packages]
    threads = [checked_threads(count) for count in options.threads or [available_processors()]]
    limits = parse_limits(options.slo) if options.slo else []
    workloads = _workloads(options)
    baseline = _baseline_package(options.baseline)
    names = _names(packages)
    place = partial(Placement, place=options.device, prepacked_dir=options.prepacked_dir)
    contenders = [
        Contender(name, place(package=package, threads=count))
        for name, package in zip(names, packages, strict=True)
        for count in threads
    ]
    baselines = [
        Contender(f"{options.baseline} (baseline)", place(package=baseline, threads=count))
        for count in threads
        if baseline
    ]
    runs = options.runs or (RUNS_OF_A_COMPARISON if baseline else RUNS)
    if options.baseline and runs < FEWEST_ROUNDS:
        raise RequestError(f"--runs {runs}: a comparison needs at least {FEWEST_ROUNDS}")
    for contender in contenders + baselines:
        check_runs_here(contender.placement.package, options.device)
        _refuse_beyond_context(contender, workloads, options.predict)
    _refuse_limits_without_figures(limits, options)
    report = read_report(options.baseline) if options.baseline and not baseline else None
    if report:
        cases = [
            (contender.name, (contender.placement.threads, load.batch, load.prompt_tokens, load.new_tokens))
            for contender in contenders
            for load in workloads
            if load.prompt_tokens is not None
        ]
        check_report(report, options.baseline, cases, other_machine=options.other_machine)
    if options.plot:
        check_plot_file(options.plot)
    return _Plan(contenders, baselines, workloads, limits, report, runs)


def _workloads(options: argparse.Namespace) -> list[Workload]:
    lengths: list[int | None] = [None] if options.prompts else options.prompt_tokens
    prompts = _read_prompts(options.prompts) if options.prompts else ()
    return [
        Workload(prompt_tokens=length, prompts=prompts, new_tokens=new_tokens, batch=batch)
        for length in lengths
        for new_tokens in options.new_tokens
        for batch in options.batch
    ]


def _read_prompts(path: Path) -> tuple[str, ...]:
    try:
        prompts = tuple(filter(None, path.read_text(encoding="utf-8").splitlines()))
    except OSError as error:
        raise RequestError(f"--prompts {path}: cannot be read ({error.strerror}); name a text file") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"--prompts {path}: byte {error.start} is no UTF-8; convert it to UTF-8 first") from error
    if not prompts:
        raise RequestError(f"--prompts {path}: holds no prompt, expected one on each line")
    return prompts


def _baseline_package(path: Path | None) -> Package | None:
    """The package to run beside; None for none, or for a report."""
    if path is None:
        return None
    if path.is_dir() or path.name == MANIFEST:
        return open_package(path)
    if not path.exists():
        raise PackageError(f"--baseline {path}: no such package or report")
    return None


def _names(packages: Sequence[Package]) -> list[str]:
    """The folders' names, or their paths where two have the same."""
    short = [package.folder.resolve().name for package in packages]
    names = short if len(set(short)) == len(short) else [str(package.folder) for package in packages]
    if len(set(names)) < len(names):
        raise RequestError("a package is named twice; to compare one with itself, name it as --baseline too")
    return names


def _refuse_limits_without_figures(limits: Sequence[Limit], options: argparse.Namespace) -> None:
    for limit in limits:
        if limit.needs_decode_steps and min(options.new_tokens) < 2:
            raise RequestError(f"--slo {limit.name}: needs --new-tokens of 2 or more")
        if limit.needs_timed_loads and not options.load_runs:
            raise RequestError(f"--slo {limit.name}: needs --load-runs of 1 or more")


def _refuse_beyond_context(contender: Contender, workloads: Sequence[Workload], lengths: Sequence[int]) -> None:
    n_ctx = contender.placement.package.manifest.config.n_ctx
    for workload in workloads:
        if (workload.prompt_tokens or 0) + workload.new_tokens > n_ctx:
            raise RequestError(
                f"{contender.name}: {workload} do not fit the model's context of {n_ctx}; take smaller "
                "--prompt-tokens or --new-tokens"
            )
    if lengths and max(lengths) >= n_ctx:
        raise RequestError(f"--predict {max(lengths)}: {contender.name} has a context of {n_ctx} tokens")


def _predictions(plan: _Plan, measured: Measured, options: argparse.Namespace) -> list[tuple[str, int, Prediction]]:
    """By contender's name and threads."""
    if not options.predict:
        return []
    return [
        (contender.name, contender.placement.threads, model.predict(length, batch))
        for contender, model in zip(plan.contenders, map(measured.step_model, range(len(plan.contenders))), strict=True)
        for length in options.predict
        for batch in options.batch
    ]


def _comparisons(
    plan: _Plan, rows: Sequence[Row], baseline_rows: Sequence[Row], measured: Measured, options: argparse.Namespace
) -> list[Comparison]:
    if plan.report:
        return compare_with_report(rows, measured.receipt, plan.report, tolerance=options.tolerance)
    return compare_packages(rows, baseline_rows, tolerance=options.tolerance)


def _write_files(rows: Sequence[Row], measured: Measured, plan: _Plan, options: argparse.Namespace) -> None:
    if options.csv:
        options.csv.write_text(csv_text(rows), encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown(rows, measured.receipt), encoding="utf-8")
    if options.plot:
        write_plot(options.plot, plan.contenders + plan.baselines, measured)


def _print(
    rows: Sequence[Row],
    receipt: dict[str, Any],
    predictions: Sequence[tuple[str, int, Prediction]],
    comparisons: Sequence[Comparison],
) -> None:
    print(table(rows))
    print()
    for name, threads, each in predictions:
        doubts = "".join(f"; {warning}" for warning in each.warnings)
        print(
            f"{name}, threads {threads}, batch {each.batch}, behind {each.past_tokens} tokens, predicted: "
            f"{each.itl_ms:.2f} ms a step ({each.low:.2f} to {each.high:.2f}){doubts}"
        )
    for comparison in comparisons:
        print(comparison)
    print(receipt_line(receipt))
    for warning in receipt["warnings"]:
        print(f"warning: {warning}")
    for row in rows:
        for warning in row.warnings:
            print(f"warning: {row}: {warning}")
