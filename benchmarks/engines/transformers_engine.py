"""transformers with torch, not compiled: the checkpoint as it is."""

from __future__ import annotations

import time

import numpy as np
import torch
from measure import Run, arguments, measure_and_report
from numpy.typing import NDArray
from transformers import GPT2LMHeadModel


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    model = GPT2LMHeadModel.from_pretrained(options.model, dtype=torch.float32).eval()
    load_s = time.perf_counter() - start

    @torch.inference_mode()
    def generate(prompts: NDArray[np.int64], new_tokens: int) -> Run:
        current, cache, steps, marks = torch.from_numpy(prompts), None, [], [time.perf_counter()]
        while len(steps) < new_tokens:
            output = model(current, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, current = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)  # [B, 1]
            steps.append(current.numpy())
            marks.append(time.perf_counter())
        return Run(marks[1] - marks[0], np.diff(marks[1:]).tolist(), np.concatenate(steps, axis=1).tolist())

    measure_and_report(options, load_s, generate, ("transformers", "torch"))


if __name__ == "__main__":
    main()
