"""CTranslate2: a folder that its own converter wrote."""

from __future__ import annotations

import json
import time

import ctranslate2
import numpy as np
from measure import Run, arguments, measure_and_report
from numpy.typing import NDArray


def main() -> None:
    options = arguments()
    start = time.perf_counter()
    model = ctranslate2.Generator(
        str(options.model), compute_type=options.type, intra_threads=options.threads, inter_threads=1
    )
    load_s = time.perf_counter() - start
    token_of = json.loads((options.model / "vocabulary.json").read_text())  # it takes no ids

    def generate(prompts: NDArray[np.int64], new_tokens: int) -> Run:
        rows: list[list[int]] = [[] for _ in prompts]
        marks = []

        def note(step: ctranslate2.GenerationStepResult) -> bool:
            rows[step.batch_id].append(step.token_id)
            if len(rows[step.batch_id]) == min(map(len, rows)):  # the last row of its step
                marks.append(time.perf_counter())
            return False

        tokens = [[token_of[token_id] for token_id in prompt] for prompt in prompts]
        start = time.perf_counter()
        model.generate_batch(
            tokens,
            max_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
            callback=note,
        )
        return Run(marks[0] - start, np.diff(marks).tolist(), rows)

    measure_and_report(options, load_s, generate, ("ctranslate2",))


if __name__ == "__main__":
    main()
