"""What batches are worth: tokens/s of a batch beside one row, and generate_many beside the least that it can take.

    scripts/bench batching PACKAGE [--batch 8] [--prompt-tokens 16,64,128] [--requests 64] [--rounds 3] [--threads N]
                                   [--json] [--speedup-at-least R] [--many-at-most R]

speedup      tokens/s of steady decoding with all rows going, over those of one row, behind prompts of so many tokens:
             what a row reads of its own, its keys and values, a batch does not share. The bar is for the shortest
             prompts.
many         the time of generate_many over requests of mixed lengths, over (the sum of their prompts' times, each run
             alone, + the tokens behind the first ones at the batch's steady speed, behind as many others as they have
             before them on average). Above 1 stand the steps at the end that fewer rows share, rows that are moved, and
             all else that a loop adds.
Both are ratios of times of the same round, since a shared machine's speed moves between rounds; told are the median,
the least and the most. Times are medians over the rounds. Greedy, end-of-text forbidden; the requests' prompts are of
136 tokens on average. Exit status 3 if a bar that was given is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.comparison.spread import Spread
from runtime import Request, SamplingOptions, TextGenerator
from runtime.command_line import CommandLineParser, run_command
from runtime.errors import VerificationError

GREEDY = SamplingOptions.greedy()
PROMPT_TOKENS = (16, 256)
NEW_TOKENS = (16, 128)
STEADY_TOKENS = 64


@dataclass(frozen=True)
class Speed:
    """Steady decoding behind prompts of some length: in a round medians of the gaps, then those of the rounds."""

    prompt_tokens: int
    row_ms: float  # a token of one row alone
    step_ms: float  # a token of each row of the batch
    speedup: Spread


@dataclass(frozen=True)
class Result:
    """Times in milliseconds, medians over the rounds."""

    batch: int
    requests: int
    speeds: list[Speed]  # of each length that was asked for, then of the one that stands for the requests
    prefills_ms: float
    steady_ms: float
    many_ms: float
    many: Spread


def random_prompts(generator: TextGenerator, lengths: list[int], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    return [rng.integers(0, generator.tokenizer.n_vocab - 1, length) for length in lengths]


def like_requests(prompts: list[NDArray[np.int64]], new_tokens: list[int]) -> int:
    """The length of prompt behind which steady decoding has as many tokens before it as the requests' steps have.

    A text that is long has more steps, and the later ones have more before them: more than its prompt and half of it.
    """
    places = [
        np.arange(len(prompt), len(prompt) + count - 1) for prompt, count in zip(prompts, new_tokens, strict=True)
    ]
    return round(float(np.concatenate(places).mean()) - np.arange(STEADY_TOKENS - 1).mean())


def steady_step_ms(generator: TextGenerator, prompts: list[NDArray[np.int64]]) -> float:
    """From a step to the next, all rows going; the median."""
    marks = [
        time.perf_counter()
        for _ in generator.steps(prompts, max_new_tokens=STEADY_TOKENS, min_new_tokens=STEADY_TOKENS, sampling=GREEDY)
    ]
    return float(np.median(np.diff(marks))) * 1e3


def prefills_ms(generator: TextGenerator, requests: list[Request]) -> float:
    """Each prompt alone, up to its first token."""
    started = time.perf_counter()
    for request in requests:
        generator.generate(request.prompt, max_new_tokens=1, min_new_tokens=1, sampling=GREEDY)
    return (time.perf_counter() - started) * 1e3


def many_ms(generator: TextGenerator, requests: list[Request], batch: int) -> float:
    started = time.perf_counter()
    results = list(generator.generate_many(requests, batch_size=batch))
    elapsed = (time.perf_counter() - started) * 1e3
    assert [result.samples[0].stats.new_tokens for result in results] == [r.max_new_tokens for r in requests]
    return elapsed


def measure(options: argparse.Namespace) -> Result:
    generator = TextGenerator.load(options.package, threads=options.threads)
    rng = np.random.default_rng(0)
    prompts = random_prompts(generator, rng.integers(*PROMPT_TOKENS, options.requests, endpoint=True).tolist(), rng)
    new_tokens = rng.integers(*NEW_TOKENS, options.requests, endpoint=True).tolist()
    requests = [
        Request(prompt, max_new_tokens=count, min_new_tokens=count, sampling=GREEDY)
        for prompt, count in zip(prompts, new_tokens, strict=True)
    ]
    lengths = [*options.prompt_tokens, like_requests(prompts, new_tokens)]
    steady = [random_prompts(generator, [length] * options.batch, rng) for length in lengths]
    shared_tokens = sum(new_tokens) - options.requests
    rounds = []
    for round_number in range(1 + options.rounds):
        times = [(steady_step_ms(generator, some[:1]), steady_step_ms(generator, some)) for some in steady]
        _, step_ms = times[-1]
        parts = prefills_ms(generator, requests), shared_tokens * step_ms / options.batch
        if round_number:  # the first is a warm-up
            rounds.append((times, parts, many_ms(generator, requests, options.batch)))
    steps = np.array([times for times, _, _ in rounds])  # [rounds, lengths, 2]
    parts, many = np.array([parts for _, parts, _ in rounds]), np.array([whole for _, _, whole in rounds])
    return Result(
        batch=options.batch,
        requests=options.requests,
        speeds=[
            Speed(length, *np.median(times, axis=0).tolist(), Spread.of(options.batch * times[:, 0] / times[:, 1]))
            for length, times in zip(lengths, steps.swapaxes(0, 1), strict=True)
        ],
        prefills_ms=float(np.median(parts[:, 0])),
        steady_ms=float(np.median(parts[:, 1])),
        many_ms=float(np.median(many)),
        many=Spread.of(many / parts.sum(axis=1)),
    )


def report(options: argparse.Namespace) -> int:
    result = measure(options)
    if options.json:
        print(json.dumps(asdict(result)))
    else:
        for speed in result.speeds:
            print(
                f"prompts of {speed.prompt_tokens}: one row {speed.row_ms:.2f} ms a token, {result.batch} rows "
                f"{speed.step_ms:.2f} ms a step: {speed.speedup.text(2)} times the tokens/s"
            )
        print(
            f"generate_many, {result.requests} requests: {result.many_ms:.0f} ms, prompts {result.prefills_ms:.0f} + "
            f"steady decoding {result.steady_ms:.0f} ms: {result.many.text(3)} times"
        )
    speedup = min(result.speeds, key=lambda speed: speed.prompt_tokens).speedup.median
    if options.speedup_at_least is not None and speedup < options.speedup_at_least:
        raise VerificationError(f"a batch is {speedup:.2f} times as fast, expected {options.speedup_at_least}")
    if options.many_at_most is not None and result.many.median > options.many_at_most:
        raise VerificationError(f"generate_many takes {result.many.median:.3f} times, expected {options.many_at_most}")
    return 0


def _lengths(text: str) -> list[int]:
    return [int(length) for length in text.split(",")]


def main() -> int:
    parser = CommandLineParser(prog="batching", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("package", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=_lengths, default=[16, 64, 128], metavar="N,N,...")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--speedup-at-least", type=float, metavar="R")
    parser.add_argument("--many-at-most", type=float, metavar="R")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    return run_command(lambda: report(options))


if __name__ == "__main__":
    sys.exit(main())
