"""llama.cpp through llama-cpp-python: a folder with <type>.gguf, see write_gguf.py. One row at a time."""

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
        n_ctx=max(prompt_tokens for prompt_tokens, _ in options.cases) + options.new_tokens,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        n_batch=512,
        verbose=False,
    )
    load_s = time.perf_counter() - start

    def generate(prompts: NDArray[np.int64], new_tokens: int) -> Run:
        model.reset()
        current, ids, marks = prompts[0].tolist(), [], [time.perf_counter()]
        while len(ids) < new_tokens:
            model.eval(current)
            logits = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),))
            current = [int(logits.argmax())]
            ids += current
            marks.append(time.perf_counter())
        return Run(marks[1] - marks[0], np.diff(marks[1:]).tolist(), [ids])

    measure_and_report(options, load_s, generate, ("llama-cpp-python", "gguf"))


if __name__ == "__main__":
    main()
