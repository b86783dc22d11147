"""gpt2-edge: a package that export.convert wrote."""

from __future__ import annotations

import time

import numpy as np
from measure import Run, arguments, measure_and_report
from numpy.typing import NDArray

from export.tune import RECIPES
from runtime.package import open_package
from runtime.text_generator import open_decoder


def main() -> None:
    options = arguments()
    start = time.perf_counter()
    package = open_package(options.model)
    manifest = package.manifest
    if (manifest.precision, manifest.kv_cache) != RECIPES[options.type]:
        raise SystemExit(f"{options.model} is {manifest.precision}, cache {manifest.kv_cache}, not {options.type}")
    decoder = open_decoder(package, threads=options.threads)
    load_s = time.perf_counter() - start
    decoder.settle()

    def generate(prompts: NDArray[np.int64], new_tokens: int) -> Run:
        batch, prompt_tokens = prompts.shape
        marks = [time.perf_counter()]
        decoding = decoder.start(batch=batch, capacity=prompt_tokens + new_tokens)
        steps = [np.array([decoding.prefill(row, prompt).argmax() for row, prompt in enumerate(prompts)])]
        marks.append(time.perf_counter())
        while len(steps) < new_tokens:
            steps.append(decoding.decode_step(steps[-1]).argmax(axis=-1))
            marks.append(time.perf_counter())
        return Run(marks[1] - marks[0], np.diff(marks[1:]).tolist(), np.stack(steps, axis=1).tolist())

    measure_and_report(options, load_s, generate, ("onnxruntime", "numpy"))


if __name__ == "__main__":
    main()
