"""optimum's ORTModelForCausalLM: a folder that export_optimum.py wrote. One row at a time."""

from __future__ import annotations

import time

import numpy as np
import onnxruntime
import torch
from measure import Run, arguments, measure_and_report
from numpy.typing import NDArray
from optimum.onnxruntime import ORTModelForCausalLM


class Stopwatch:
    """A streamer that only notes when something came: the prompt, then each token."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def put(self, _ids: torch.Tensor) -> None:
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        pass


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = options.threads
    (graph,) = options.model.glob("*.onnx")  # its name depends on the type
    start = time.perf_counter()
    model = ORTModelForCausalLM.from_pretrained(options.model, file_name=graph.name, session_options=session_options)
    load_s = time.perf_counter() - start

    def generate(prompts: NDArray[np.int64], new_tokens: int) -> Run:
        watch, ids = Stopwatch(), torch.from_numpy(prompts)
        start = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            streamer=watch,
            pad_token_id=options.n_vocab - 1,
        )
        tokens = watch.marks[1:]
        return Run(tokens[0] - start, np.diff(tokens).tolist(), output[:, prompts.shape[1] :].tolist())

    measure_and_report(options, load_s, generate, ("optimum-onnx", "onnxruntime", "transformers", "torch"))


if __name__ == "__main__":
    main()
