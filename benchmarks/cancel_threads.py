"""Do many threads with random cancels and deadlines leave texts and memory as they are?

    scripts/bench cancel_threads PACKAGE [--threads 16] [--seconds 60] [--seed 0] [--json]

All threads share one loaded package. Each asks again and again for one of a few texts, in one of the ways that there
are; one more thread cancels them at random, and some have a deadline. Exit status 3 if an error was raised, if a text
differs from the single-threaded one (or, where it was cut, from its beginning), or if resident memory grew by more
than 5% after the first 10 seconds (half of the time, if that is less).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from runtime import Request, Sample, SamplingOptions, TextGenerator
from runtime.command_line import CommandLineParser, run_command
from runtime.errors import VerificationError

N_TEXTS = 12
NEW_TOKENS = 40
WARM_SECONDS = 10
GROWTH = 1.05


@dataclass
class Report:
    """What became of all requests."""

    ended: Counter[str] = field(default_factory=Counter)  # samples by finish reason
    wrong: list[str] = field(default_factory=list)  # texts that are not the single-threaded ones
    errors: list[str] = field(default_factory=list)
    warm_rss_bytes: int = 0
    last_rss_bytes: int = 0


class Texts:
    """A few requests and the samples that one thread gets of them."""

    def __init__(self, generator: TextGenerator) -> None:
        self.generator = generator
        self.requests = [
            Request(
                f"{'The sea, ' * (number % 4 * 10)}once {number}",
                max_new_tokens=NEW_TOKENS,
                sampling=SamplingOptions(seed=number),
            )
            for number in range(N_TEXTS)
        ]
        self.expected = [result.samples[0] for result in generator.generate_many(self.requests, batch_size=1)]

    def ask(self, rng: random.Random, cancel: threading.Event, report: Report) -> None:
        """One request or several, in some way, with or without a deadline."""
        deadline_ms = rng.choice([None, None, 10 ** rng.uniform(0, 3.5)])
        numbers = rng.choices(range(N_TEXTS), k=rng.choice([1, 1, 4]))
        requests = [self.requests[number] for number in numbers]
        if rng.random() < 0.3:
            (first, request), *_ = zip(numbers, requests, strict=True)
            pieces = self.generator.stream(
                request.prompt,
                max_new_tokens=NEW_TOKENS,
                sampling=request.sampling,
                deadline_ms=deadline_ms,
                cancel=cancel,
            )
            if not self.expected[first].text.startswith("".join(pieces).rstrip("\N{REPLACEMENT CHARACTER}")):
                report.wrong.append(f"stream of text {first}")
            return
        many = [
            Request(
                request.prompt,
                max_new_tokens=NEW_TOKENS,
                sampling=request.sampling,
                deadline_ms=deadline_ms,
                cancel=cancel,
            )
            for request in requests
        ]
        for result in self.generator.generate_many(many, batch_size=3):
            self.judge(numbers[result.index], result.samples[0], report)

    def judge(self, number: int, sample: Sample, report: Report) -> None:
        whole = self.expected[number]
        cut = sample.finish_reason in ("cancelled", "deadline")
        if sample.ids != (whole.ids[: len(sample.ids)] if cut else whole.ids):
            report.wrong.append(f"text {number}: {sample.text!r}, expected {whole.text!r}")
        report.ended[sample.finish_reason] += 1


def run_threads(generator: TextGenerator, *, threads: int, seconds: float, seed: int) -> Report:
    """Have many threads ask for texts, cancel some, and compare all."""
    texts, report = Texts(generator), Report()
    stop_at = time.perf_counter() + seconds
    cancels = [threading.Event() for _ in range(threads)]

    def work(number: int) -> None:
        rng = random.Random(seed * threads + number)
        while time.perf_counter() < stop_at:
            cancels[number] = threading.Event()
            try:
                texts.ask(rng, cancels[number], report)
            except Exception as error:  # noqa: BLE001  whatever it is, it is what we look for
                report.errors.append(repr(error))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    rng = random.Random(seed)
    warm_at = stop_at - seconds + min(WARM_SECONDS, seconds / 2)
    while time.perf_counter() < stop_at:
        time.sleep(rng.expovariate(20))
        rng.choice(cancels).set()
        if time.perf_counter() < warm_at:
            report.warm_rss_bytes = resident_bytes()
    for worker in workers:
        worker.join()
    report.last_rss_bytes = resident_bytes()
    return report


def resident_bytes() -> int:
    """Resident memory of this process, on Linux."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def check(options: argparse.Namespace) -> int:
    generator = TextGenerator.load(options.package)
    report = run_threads(generator, threads=options.threads, seconds=options.seconds, seed=options.seed)
    if options.json:
        print(json.dumps(asdict(report)))
    else:
        growth = report.last_rss_bytes / report.warm_rss_bytes - 1
        print(
            f"{sum(report.ended.values())} samples: {dict(report.ended)}; {len(report.wrong)} wrong, "
            f"{len(report.errors)} errors; resident memory {report.warm_rss_bytes / 1e6:.0f} MB, at the end "
            f"{report.last_rss_bytes / 1e6:.0f} MB ({growth:+.1%})"
        )
    if report.errors or report.wrong:
        raise VerificationError(f"not as with one thread: {(report.errors + report.wrong)[0]}")
    if report.last_rss_bytes > GROWTH * report.warm_rss_bytes:
        raise VerificationError("resident memory goes on growing")
    return 0


def main() -> int:
    parser = CommandLineParser(prog="cancel_threads", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("package", type=Path)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    return run_command(lambda: check(options))


if __name__ == "__main__":
    sys.exit(main())
