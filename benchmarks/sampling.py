"""What choosing one token costs beside running the model, option by option, over GPT-2's 50,257 logits.

    scripts/bench sampling [--tokens 200] [--past 900] [--seed 0] [--json]

Each row is the time of one token: biases, penalties and bans behind --past ids, then the choice; of the last row, the
log-probabilities of the chosen token and the top 20. Logits are drawn anew for each token, outside the clock.
Exit status 3 if any takes 0.5 ms or more at the median.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from runtime import SamplingOptions
from runtime.command_line import CommandLineParser, run_command
from runtime.errors import VerificationError
from runtime.log_probabilities import log_probabilities
from runtime.logits_processors import LogitsProcessors
from runtime.sampling import choose_token, random_uniform

N_VOCAB = 50257
LIMIT_MS = 0.5
WARM_UP_TOKENS = 10
LOGIT_SPREAD = 3.0
"""Standard deviation. The most probable of 50,257 such logits has a probability of a few percent; top_p 0.9 keeps
some thousands."""

OPTIONS: Mapping[str, SamplingOptions] = {
    "greedy": SamplingOptions.greedy(),
    "top_k 40 (default)": SamplingOptions(),
    "temperature alone": SamplingOptions(temperature=0.8, top_k=0),
    "temperature + top_k + top_p": SamplingOptions(temperature=0.8, top_k=40, top_p=0.9),
    "temperature + top_p": SamplingOptions(temperature=0.8, top_k=0, top_p=0.9),
    "top_p, openai's rule": SamplingOptions(top_k=0, top_p=0.9, rule="openai"),
    "top_k 1000": SamplingOptions(top_k=1000),
    "min_p": SamplingOptions(top_k=0, min_p=0.05),
    "typical_p": SamplingOptions(top_k=0, typical_p=0.9),
    "repetition_penalty": SamplingOptions(repetition_penalty=1.2),
    "presence + frequency": SamplingOptions(presence_penalty=0.5, frequency_penalty=0.5),
    "no_repeat_ngram_size 3": SamplingOptions(no_repeat_ngram_size=3),
    "sequence_bias, 300 tokens": SamplingOptions(sequence_bias=dict.fromkeys(range(300), -1.0)),
    "bad words, 1,000 pairs": SamplingOptions(bad_words_ids=[[token, token + 1] for token in range(1000)]),
    "all of them": SamplingOptions(
        temperature=0.8,
        top_k=0,
        top_p=0.9,
        min_p=0.001,
        typical_p=0.9,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        no_repeat_ngram_size=3,
        sequence_bias=dict.fromkeys(range(300), -1.0),
        bad_words_ids=[[token, token + 1] for token in range(1000)],
    ),
}


@dataclass(frozen=True)
class Row:
    """Milliseconds of one token."""

    options: str
    p50_ms: float
    p95_ms: float
    max_ms: float


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    for name, options in OPTIONS.items():
        processors = LogitsProcessors(options, n_vocab=N_VOCAB)
        yield _row(name, [_choose(options, processors, *given) for given in _tokens(arguments)])
    yield _row("log-probabilities", [_log_probabilities(logits) for _, logits in _tokens(arguments)])


def _tokens(arguments: argparse.Namespace) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    """Ids so far and logits [V] of each token."""
    rng = np.random.default_rng(arguments.seed)
    for _ in range(WARM_UP_TOKENS + arguments.tokens):
        ids = rng.integers(0, N_VOCAB, arguments.past).tolist()
        yield ids, LOGIT_SPREAD * rng.standard_normal(N_VOCAB, np.float32)


def _choose(
    options: SamplingOptions, processors: LogitsProcessors, ids: list[int], logits: NDArray[np.float32]
) -> float:
    start = time.perf_counter()
    processed = processors.apply(logits, ids=ids, prompt_length=len(ids) // 2)
    choose_token(processed, options, random_uniform(0, 0, len(ids)))
    return time.perf_counter() - start


def _log_probabilities(logits: NDArray[np.float32]) -> float:
    start = time.perf_counter()
    log_probabilities(logits, 0, top=20)
    return time.perf_counter() - start


def _row(name: str, times_s: list[float]) -> Row:
    p50, p95, largest = np.percentile(np.array(times_s[WARM_UP_TOKENS:]) * 1e3, [50, 95, 100])
    return Row(name, round(float(p50), 4), round(float(p95), 4), round(float(largest), 4))


def report(arguments: argparse.Namespace) -> int:
    rows = list(measure(arguments))
    receipt = {
        "n_vocab": N_VOCAB,
        "past": arguments.past,
        "tokens": arguments.tokens,
        "warm_up_tokens": WARM_UP_TOKENS,
        "seed": arguments.seed,
        "numpy": version("numpy"),
    }
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "receipt": receipt}, indent=2))
    else:
        print(f"{'ms a token':28}{'p50':>8}{'p95':>8}{'max':>8}")
        for row in rows:
            print(f"{row.options:28}{row.p50_ms:8.3f}{row.p95_ms:8.3f}{row.max_ms:8.3f}")
        print(", ".join(f"{name} {value}" for name, value in receipt.items()))
    if slow := [f"{row.options} {row.p50_ms}" for row in rows if row.p50_ms >= LIMIT_MS]:
        raise VerificationError(f"ms a token: {', '.join(slow)}; expected less than {LIMIT_MS}")
    return 0


def main() -> int:
    parser = CommandLineParser(prog="sampling", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--past", type=int, default=900, metavar="IDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    arguments = parser.parse_args()
    return run_command(lambda: report(arguments))


if __name__ == "__main__":
    sys.exit(main())
