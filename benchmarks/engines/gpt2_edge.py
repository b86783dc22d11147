"""gpt2-edge: a package that export.convert wrote."""

from __future__ import annotations

import time

import numpy as np
from measure import Run, arguments, measure_and_report
from numpy.typing import NDArray

from runtime.package import open_package
from runtime.text_generator import open_decoder


def main() -> None:
    options = arguments()
    start = time.perf_counter()
    package = open_package(options.model)
    if package.manifest.precision != options.type:
        raise SystemExit(f"{options.model} is {package.manifest.precision}, not {options.type}")
    decoder = open_decoder(package, threads=options.threads)
    load_s = time.perf_counter() - start

    def generate(prompt: NDArray[np.int64]) -> tuple[Run, list[int]]:
        marks = [time.perf_counter()]
        decoding = decoder.start(batch=1, capacity=len(prompt) + options.new_tokens)
        ids = [int(decoding.prefill(0, prompt).argmax())]
        marks.append(time.perf_counter())
        while len(ids) < options.new_tokens:
            ids.append(int(decoding.decode_step(np.array(ids[-1:]))[0].argmax()))
            marks.append(time.perf_counter())
        return (marks[1] - marks[0], np.diff(marks[1:]).tolist()), ids

    measure_and_report("gpt2-edge", options, load_s, generate)


if __name__ == "__main__":
    main()
