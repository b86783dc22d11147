"""llama.cpp through llama-cpp-python: a folder with <type>.gguf, see write_gguf.py."""

from __future__ import annotations

import time

import numpy as np
from llama_cpp import Llama
from measure import Run, arguments, measure_and_report
from numpy.typing import NDArray


def main() -> None:
    options = arguments()
    start = time.perf_counter()
    model = Llama(
        str(options.model / f"{options.type}.gguf"),
        n_ctx=1024,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        n_batch=512,
        verbose=False,
    )
    load_s = time.perf_counter() - start

    def generate(prompt: NDArray[np.int64]) -> tuple[Run, list[int]]:
        model.reset()
        current, ids, marks = prompt.tolist(), [], [time.perf_counter()]
        while len(ids) < options.new_tokens:
            model.eval(current)
            logits = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),))
            current = [int(logits.argmax())]
            ids += current
            marks.append(time.perf_counter())
        return (marks[1] - marks[0], np.diff(marks[1:]).tolist()), ids

    measure_and_report("llama.cpp", options, load_s, generate)


if __name__ == "__main__":
    main()
