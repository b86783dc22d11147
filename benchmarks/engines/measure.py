"""What the engines' scripts share: arguments, the prompt, the one JSON line. Runs in the peers' environments too."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WARM_UPS = 1

Run = tuple[float, list[float]]
"""Seconds to the first token, and from each token to the next."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, help="folder; what it must hold depends on the engine")
    parser.add_argument("--type", required=True, help="precision, in the engine's own words")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    return parser.parse_args()


def prompt_ids(n_tokens: int, run: int, n_vocab: int = 50257) -> NDArray[np.int64]:
    """[n_tokens] int64 random ids, the same for every engine; another prompt for each run, as some cache prompts."""
    return np.roll(np.random.default_rng(0).integers(0, n_vocab - 1, n_tokens), run)


def measure_and_report(
    engine: str,
    options: argparse.Namespace,
    load_s: float,
    generate: Callable[[NDArray[np.int64]], tuple[Run, Sequence[int]]],
) -> None:
    """Warm up, run, and print the medians; `generate` takes prompt ids and returns the times and the ids it wrote."""
    results = [generate(prompt_ids(options.prompt_tokens, run)) for run in range(WARM_UPS + options.runs)]
    measured = [run for run, _ in results[WARM_UPS:]]
    print(
        json.dumps(
            {
                "engine": engine,
                "type": options.type,
                "load_s": load_s,
                "ttft_ms": statistics.median(ttft for ttft, _ in measured) * 1e3,
                "decode_ms": statistics.median(statistics.median(gaps) for _, gaps in measured) * 1e3,
                "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
                "first_ids": [int(token_id) for token_id in results[0][1][:8]],
            }
        )
    )
