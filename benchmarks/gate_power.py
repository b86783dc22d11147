"""What a comparison with a baseline package is worth: how often it sees a slow-down that is there, and one that is not.

    scripts/bench gate_power PACKAGE [--trials 20] [--slow-down 0.10] [--runs 32] [--prompt-tokens 64] [--new-tokens 16]

Each trial is one comparison as `python -m runtime.benchmark PACKAGE --baseline PACKAGE` makes it, of the package with
itself; in every other trial the first of the two sleeps in a logits callback, before each token, for a share of its own
step time. Exit status 3 if the slow-down went unseen in more than one of 20 trials, or if more than one of 20 was
called different where nothing was planted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.benchmark.command import RUNS_OF_A_COMPARISON
from runtime.benchmark.comparison import LOADS, TOLERANCE, Comparison, compare_packages
from runtime.benchmark.engine import Engine, Placement
from runtime.benchmark.rounds import Contender, measure
from runtime.benchmark.workload import Workload
from runtime.command_line import CommandLineParser, run_command, whole_number
from runtime.errors import VerificationError
from runtime.package import Package, open_package
from runtime.processor import available_processors

MISSES_ALLOWED = 1 / 20


def sleep_and_pass(seconds: float, _ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """A logits callback that costs so much; it waits actively, since a sleep this short would last longer."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass
    return logits


def trial(package: Package, workload: Workload, slow_down_s: float, runs: int) -> list[Comparison]:
    """One comparison of a package with itself."""
    threads = available_processors()
    slowed = Placement(
        package=package,
        threads=threads,
        logits_processor=partial(sleep_and_pass, slow_down_s) if slow_down_s else None,
    )
    contenders = [Contender("package", slowed), Contender("baseline", Placement(package=package, threads=threads))]
    measured = measure(contenders, [workload], runs=runs, loads=LOADS, warmup=1, load_runs=0)
    return compare_packages(measured.rows[0], measured.rows[1], tolerance=TOLERANCE)


def step_seconds(package: Package, workload: Workload) -> float:
    """How long a decode step takes, the median of a few runs."""
    with Engine(Placement(package=package, threads=available_processors())) as engine:
        gaps = [gap for number in range(5) for gap in engine.run(workload, number).times.itl_ms]
    return float(np.median(gaps)) / 1e3


def gate_power(options: argparse.Namespace) -> int:
    package = open_package(options.package)
    workload = Workload(prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens, batch=1)
    seen, false_alarms, trials = 0, 0, []
    for number in range(options.trials):
        for planted in (options.slow_down, 0.0):
            seconds = planted * step_seconds(package, workload) if planted else 0.0
            comparisons = trial(package, workload, seconds, options.runs)
            decode = next(each for each in comparisons if each.figure == "itl_ms")
            seen += planted > 0 and decode.verdict == "slower"
            false_alarms += planted == 0 and any(each.verdict != "no difference" for each in comparisons)
            trials.append({"planted": planted, "verdicts": [str(each) for each in comparisons]})
            print(f"trial {number + 1}, planted {planted:.0%}: {'; '.join(map(str, comparisons))}", file=sys.stderr)
    result = {"trials": options.trials, "slow_down": options.slow_down, "seen": seen, "false_alarms": false_alarms}
    print(json.dumps({**result, "each": trials}) if options.json else result)
    allowed = MISSES_ALLOWED * options.trials
    if options.trials - seen > allowed or false_alarms > allowed:
        raise VerificationError(f"more than {allowed:.0f} of {options.trials} trials were judged wrongly: {result}")
    return 0


def main() -> int:
    parser = CommandLineParser(prog="gate_power", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("package", type=Path, help="folder that export.convert wrote")
    parser.add_argument("--trials", type=whole_number(1), default=20, metavar="N", help="of each kind; default 20")
    parser.add_argument("--slow-down", type=float, default=0.10, metavar="SHARE", help="of a step's time; default 0.10")
    parser.add_argument(
        "--runs",
        type=whole_number(LOADS),
        default=RUNS_OF_A_COMPARISON,
        metavar="N",
        help=f"of a comparison; default {RUNS_OF_A_COMPARISON}",
    )
    parser.add_argument("--prompt-tokens", type=whole_number(1), default=64, metavar="N")
    parser.add_argument("--new-tokens", type=whole_number(2), default=16, metavar="N")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    return run_command(lambda: gate_power(options))


if __name__ == "__main__":
    sys.exit(main())
