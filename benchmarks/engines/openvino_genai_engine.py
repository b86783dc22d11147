"""OpenVINO GenAI: a folder that optimum-cli exported."""

from __future__ import annotations

import time

import numpy as np
import openvino
import openvino_genai
from measure import Run, arguments, measure_and_report
from numpy.typing import NDArray


def main() -> None:
    options = arguments()
    start = time.perf_counter()
    pipeline = openvino_genai.LLMPipeline(str(options.model), "CPU", INFERENCE_NUM_THREADS=options.threads)
    load_s = time.perf_counter() - start
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = options.new_tokens
    config.ignore_eos, config.do_sample = True, False

    def generate(prompt: NDArray[np.int64]) -> tuple[Run, list[int]]:
        ids = openvino.Tensor(prompt[None])
        mask = openvino.Tensor(np.ones_like(prompt[None]))
        result = pipeline.generate(openvino_genai.TokenizedInputs(ids, mask), config)
        # The pipeline tells a mean gap only; a mean is kinder to it than nothing, and its runs are even.
        metrics = result.perf_metrics
        return (metrics.get_ttft().mean / 1e3, [metrics.get_tpot().mean / 1e3]), list(result.tokens[0])

    measure_and_report("openvino-genai", options, load_s, generate)


if __name__ == "__main__":
    main()
