"""What the engines' scripts share: arguments, prompts, the one JSON line. Runs in the peers' environments too."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WARM_UP_TOKENS = 4
"""New tokens of the run before each case: enough for every shape of the graph, and cheap beside a long prompt."""

FIRST_IDS = 8
"""So many ids of each row are told, to be held against another engine's."""


@dataclass(frozen=True)
class Run:
    """What one call for B rows took, and what it wrote."""

    ttft_s: float  # from the call until every row has its first token
    gaps_s: Sequence[float]  # from each step to the next
    ids: Sequence[Sequence[int]]  # [B][new tokens]


Generate = Callable[[NDArray[np.int64], int], Run]
"""Greedy: (prompt ids [B, T], new tokens) -> Run."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, help="folder; what it must hold depends on the engine")
    parser.add_argument("--type", required=True, help="precision, in the engine's own words")
    parser.add_argument("--cases", nargs="+", default=[(128, 1)], type=_case, help="PROMPT_TOKENSxBATCH")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--n-vocab", type=int, default=50257)
    return parser.parse_args()


def _case(text: str) -> tuple[int, int]:
    prompt_tokens, batch = text.split("x")
    return int(prompt_tokens), int(batch)


def prompt_ids(prompt_tokens: int, batch: int, run: int, n_vocab: int) -> NDArray[np.int64]:
    """[B, T] random ids, the same for every engine, none of them the last (end of text).

    No two runs or cases begin alike, as some engines remember what they have seen.
    """
    return np.random.default_rng((run, prompt_tokens, batch)).integers(0, n_vocab - 1, (batch, prompt_tokens))


def measure_and_report(options: argparse.Namespace, load_s: float, generate: Generate, packages: Sequence[str]) -> None:
    """Run every case and print the figures; `packages` are those whose versions count."""
    cases = [_measure(options, generate, prompt_tokens, batch) for prompt_tokens, batch in options.cases]
    print(json.dumps({"versions": {name: version(name) for name in packages}, "load_s": load_s, "cases": cases}))


def _measure(options: argparse.Namespace, generate: Generate, prompt_tokens: int, batch: int) -> dict[str, object]:
    prompts = [prompt_ids(prompt_tokens, batch, run, options.n_vocab) for run in range(1 + options.runs)]
    generate(prompts[0], min(WARM_UP_TOKENS, options.new_tokens))
    runs = [generate(prompt, options.new_tokens) for prompt in prompts[1:]]
    for run in runs:
        if [len(row) for row in run.ids] != [options.new_tokens] * batch or len(run.gaps_s) != options.new_tokens - 1:
            raise SystemExit(
                f"{options.model}: not {options.new_tokens} new tokens, one a step, in each of {batch} rows"
            )
    return {
        "prompt_tokens": prompt_tokens,
        "batch": batch,
        "ttft_ms": statistics.median(run.ttft_s for run in runs) * 1e3,
        "decode_ms": statistics.median(statistics.median(run.gaps_s) for run in runs) * 1e3,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,  # of the process, so far
        "first_ids": [[int(token_id) for token_id in row[:FIRST_IDS]] for row in runs[0].ids],
    }
