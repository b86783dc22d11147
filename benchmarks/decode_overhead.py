"""How much of a decode step is ours: the time outside session.run, measured inside the same process.

    scripts/bench decode_overhead PACKAGE [--prompt-tokens 128] [--new-tokens 64] [--runs 5]

The whole path of TextGenerator is run (sampling included); only the call into onnxruntime is timed within it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from runtime import SamplingOptions, TextGenerator


class TimedSession:
    """The real session, with a clock around the one call that runs the graph."""

    def __init__(self, session: object) -> None:
        self._session = session
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: object) -> None:
        start = time.perf_counter()
        self._session.run_with_iobinding(binding)  # type: ignore[attr-defined]
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    generator = TextGenerator.load(options.package)
    session = TimedSession(generator.decoder.session)
    generator.decoder.session = session  # type: ignore[assignment]
    prompt = np.random.default_rng(0).integers(0, generator.config.eos_token_id, options.prompt_tokens)
    for name, sampling in (("greedy", SamplingOptions.greedy()), ("top_k 40", SamplingOptions(seed=0))):
        outside = []
        for _ in range(options.runs):
            session.seconds.clear()
            result = generator.generate(prompt, max_new_tokens=options.new_tokens, sampling=sampling)
            stats = result.samples[0].stats
            steps = stats.new_tokens - 1
            whole = steps / stats.decode_tokens_per_s
            outside.append((whole - sum(session.seconds[-steps:])) / steps * 1e3)
        inside = statistics.median(session.seconds[-steps:]) * 1e3
        print(f"{name}: {statistics.median(outside):.3f} ms a token outside session.run, {inside:.2f} ms inside")


if __name__ == "__main__":
    main()
