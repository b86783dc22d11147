"""OpenVINO GenAI: a folder that optimum-cli exported. One row at a time."""

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

    def generate(prompts: NDArray[np.int64], new_tokens: int) -> Run:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos, config.do_sample = True, False
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(prompts), openvino.Tensor(np.ones_like(prompts)))
        result = pipeline.generate(inputs, config)
        raw = result.perf_metrics.raw_metrics  # in microseconds
        return Run(raw.m_times_to_first_token[0] / 1e6, [gap / 1e6 for gap in raw.m_durations], result.tokens)

    measure_and_report(options, load_s, generate, ("openvino-genai", "openvino", "optimum-intel", "nncf"))


if __name__ == "__main__":
    main()
