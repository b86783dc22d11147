"""Are the reported decode times those of the graph? The benchmark's clock beside clocks around session.run.

    scripts/bench decode_overhead PACKAGE [--prompt-tokens 128] [--new-tokens 64] [--runs 5]

`runtime.benchmark.timing.time_run` reports the gaps between tokens as ever; meanwhile, in the same process, the caller
of session.run notes when each of its calls begins and ends. Exit status 3 if the median gap is not, within 2%, the
median time from one call to the next. What passes outside session.run is the cost of choosing, decoding and binding:
printed too, with top-k sampling as well.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from runtime import SamplingOptions, TextGenerator
from runtime.benchmark.timing import time_run
from runtime.benchmark.workload import Workload
from runtime.command_line import CommandLineParser, run_command
from runtime.errors import VerificationError

AGREEMENT = 0.02
SAMPLED = SamplingOptions(seed=0, top_k=40)


class TimedSession:
    """The real session, with a clock before and after the one call that runs the graph."""

    def __init__(self, session: object) -> None:
        self._session = session
        self.calls: list[tuple[float, float]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: object, options: object) -> None:
        start = time.perf_counter()
        self._session.run_with_iobinding(binding, options)  # type: ignore[attr-defined]
        self.calls.append((start, time.perf_counter()))

    def steps(self, count: int) -> tuple[list[float], list[float]]:
        """Of the last calls, in ms: from the end of one to the end of the next, and inside them."""
        last = self.calls[-count:]
        between = [(after[1] - before[1]) * 1e3 for before, after in pairwise(self.calls[-count - 1 :])]
        return between, [(end - start) * 1e3 for start, end in last]


def compare_clocks(options: argparse.Namespace) -> int:
    generator = TextGenerator.load(options.package)
    generator.decoder.settle()
    session = TimedSession(generator.decoder.session)
    generator.decoder.session = session  # type: ignore[assignment]
    workload = Workload(prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens, batch=1)
    steps = options.new_tokens - 1
    reported: list[float] = []
    between: list[float] = []
    inside: list[float] = []
    for run in range(1 + options.runs):
        times = time_run(generator, workload.texts(generator.tokenizer, run), new_tokens=options.new_tokens)
        if run:  # the first is a warm-up
            reported += times.itl_ms
            gaps, calls = session.steps(steps)
            between += gaps
            inside += calls
    ratio = float(np.median(reported) / np.median(between))
    print(
        f"greedy: reported {np.median(reported):.3f} ms a token, {np.median(between):.3f} ms from one session.run to "
        f"the next (ratio {ratio:.4f}), {np.median(inside):.3f} ms inside, "
        f"{np.median(np.subtract(between, inside)):.3f} ms outside"
    )
    ids = generator.tokenizer.encode(workload.texts(generator.tokenizer, 0)[0])
    generator.generate(ids, max_new_tokens=options.new_tokens, min_new_tokens=options.new_tokens, sampling=SAMPLED)
    gaps, calls = session.steps(steps)
    print(f"top_k 40: {np.median(np.subtract(gaps, calls)):.3f} ms a token outside session.run")
    if abs(ratio - 1) > AGREEMENT:
        raise VerificationError(f"the clocks disagree by {ratio - 1:+.1%}, expected at most {AGREEMENT:.0%}")
    return 0


def main() -> int:
    parser = CommandLineParser(prog="decode_overhead", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("package", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    return run_command(lambda: compare_clocks(options))


if __name__ == "__main__":
    sys.exit(main())
