"""The device-side certificate: a package's golden prompts, replayed where it will run.

    python -m runtime.verify PACKAGE --full

Needs numpy and onnxruntime only. Each prompt is run whole, in pieces and token by token; the logits must be those that
the package gave where it was converted, and the greedy continuation the same ids.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .activations import NARROW, NARROW_RECIPE
from .command_line import CommandLineParser, add_device, print_json, run_command
from .decoder import Decoder
from .errors import PackageError, VerificationError
from .package import GoldenPrompt, open_package
from .receipt import Receipt
from .text_generator import open_decoder

PIECE_TOKENS = 8
"""How a golden prompt is cut: short enough that a prompt of a few words has several pieces."""

OTHER_ACTIVATIONS = 8.0
"""Times the distance from the oracle at the conversion, root mean square: 7 bits round twice as coarsely as 8, so that
results of both are 5 ** 0.5 times as far apart, and the furthest of some thirty logits 3.6 times as far as they are."""


@dataclass(frozen=True, slots=True)
class GoldenResult:
    """What one golden prompt gave here. Differences are of logits, against what the package gave when converted."""

    largest_difference: dict[str, float]  # by way of running the prompt
    tolerance: float
    greedy_ids: tuple[int, ...]
    expected_greedy_ids: tuple[int, ...]

    @property
    def held(self) -> bool:
        # not (difference > tolerance) would let a NaN pass
        within = all(difference <= self.tolerance for difference in self.largest_difference.values())
        return within and self.greedy_ids == self.expected_greedy_ids


def replay(decoder: Decoder, golden: GoldenPrompt, *, other_activations: bool = False) -> GoldenResult:
    """Run a golden prompt in every way and continue it greedily.

    Where activations are rounded to other bits than at the conversion, each logit may move by what 7 bits lose and as
    much again, and the greedy ids are not judged.
    """
    prompt = np.array(golden.prompt_ids, np.int64)
    top, expected = list(golden.top_ids), np.array(golden.package_logits)
    expected_greedy_ids = () if other_activations else golden.greedy_ids
    tolerance = golden.tolerance
    if other_activations:
        distance = float(np.sqrt(np.mean(np.square(expected - golden.oracle_logits))))
        tolerance = max(tolerance, OTHER_ACTIVATIONS * distance)
    greedy_ids, ways = run_each_way(decoder, prompt, n_greedy=len(expected_greedy_ids))
    return GoldenResult(
        largest_difference={
            way: float(np.abs(logits[len(prompt) - 1, top] - expected).max()) for way, logits in ways.items()
        },
        tolerance=tolerance,
        greedy_ids=tuple(greedy_ids.tolist()),
        expected_greedy_ids=expected_greedy_ids,
    )


def run_each_way(
    decoder: Decoder, prompt: NDArray[np.int64], *, n_greedy: int
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float32]]]:
    """Run a prompt token by token, go on greedily, then run the same ids in one run and in pieces.

    Args:
        decoder: the model.
        prompt: [T] int64, T >= 1.
        n_greedy: ids to choose after it; an end-of-text does not end them.
    Returns:
        The greedy ids [n_greedy] int64; by way, the logits after each token but the last, [T + n_greedy - 1, V] (T of
        them where n_greedy is 0).
    """
    ids: list[int] = prompt.tolist()
    logits: list[NDArray[np.float32]] = []
    to_run = max(len(prompt), len(prompt) + n_greedy - 1)  # the last id is chosen, not run
    decoding = decoder.start(batch=1, capacity=to_run)
    while len(logits) < to_run:
        logits.append(decoding.decode_step(np.array([ids[len(logits)]], np.int64)).copy())
        if len(logits) == len(ids) and len(ids) < len(prompt) + n_greedy:
            ids.append(int(logits[-1].argmax()))
    sequence = np.array(ids[: len(logits)], np.int64)
    ways = {"token by token": np.concatenate(logits)}
    for way, chunk_tokens in (("one run", len(sequence)), ("pieces", PIECE_TOKENS)):
        ways[way] = np.concatenate([piece.copy() for piece in decoder.logits(sequence, chunk_tokens=chunk_tokens)])
    return np.array(ids[len(prompt) :], np.int64), ways


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    return run_command(lambda: _verify(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLineParser(
        prog="python -m runtime.verify",
        description="Check a package's files and replay its golden prompts here; exit status 3 if one fails.",
    )
    parser.add_argument("package", help="folder that export.convert wrote")
    add_device(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="default: the processors this process may use")
    parser.add_argument("--full", action="store_true", help="check the sha256 of the weights too")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    return parser.parse_args(argv)


def _verify(options: argparse.Namespace) -> int:
    package = open_package(options.package, full=options.full)
    if not package.manifest.golden:
        raise PackageError(f"{package.folder}: no golden prompts to replay; convert the checkpoint again")
    decoder = open_decoder(package, device=options.device, threads=options.threads)
    other_activations = (decoder.activations == NARROW) != (NARROW_RECIPE in package.manifest.recipe)
    results = [replay(decoder, golden, other_activations=other_activations) for golden in package.manifest.golden]
    report: Callable[[Sequence[GoldenResult], Receipt], None] = _print_json if options.json else _print_table
    report(results, decoder.receipt)
    failed = [str(number) for number, result in enumerate(results, start=1) if not result.held]
    if failed:
        raise VerificationError(
            f"{package.folder}: golden prompt {', '.join(failed)} of {len(results)} gave other numbers here than where "
            "the package was converted; copy it again (runtime.verify --full tells if it was damaged), or convert it "
            "with --precision fp32"
        )
    return 0


def _print_json(results: Sequence[GoldenResult], receipt: Receipt) -> None:
    print_json(
        {
            "held": all(result.held for result in results),
            "receipt": receipt.to_dict(),
            "golden": [{"held": result.held, **_json_values(result)} for result in results],
        }
    )


def _json_values(result: GoldenResult) -> dict[str, Any]:
    """JSON has no NaN, which a damaged model may give: null stands for it."""
    differences = result.largest_difference.items()
    finite = {way: difference if math.isfinite(difference) else None for way, difference in differences}
    return {**asdict(result), "largest_difference": finite}


def _print_table(results: Sequence[GoldenResult], receipt: Receipt) -> None:
    for number, result in enumerate(results, start=1):
        ways = ", ".join(f"{way} {difference:.2g}" for way, difference in result.largest_difference.items())
        print(
            f"golden prompt {number}: {'held' if result.held else 'FAILED'}; largest difference of a logit: {ways} "
            f"(tolerance {result.tolerance:.2g}); greedy ids "
            f"{'equal' if result.greedy_ids == result.expected_greedy_ids else 'differ'} ({len(result.greedy_ids)})"
        )
    print(f"receipt: {receipt}")


if __name__ == "__main__":
    sys.exit(main())
