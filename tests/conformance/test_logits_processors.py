"""Every bias, penalty, ban and warper against transformers' class for it, on random logits and ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.logits_processors import LogitsProcessors
from runtime.sampling import SamplingOptions, warp_logits

CASES = 40

N_VOCAB = 60
EOS_IDS = [59, 3]

ROUNDING = 2e-6
"""Between two float32 implementations, relative. Measured: 0."""

Float32Array = NDArray[np.float32]
Classes = Callable[[Any, int], list[Any]]


@dataclass(frozen=True)
class Case:
    """Options of ours, and the same as transformers' objects; `classes` takes its module and the prompt's length."""

    name: str
    options: SamplingOptions
    classes: Classes
    min_new_tokens: int = 0


BIAS = {(5,): 1.5, (7,): -2.25, (1, 2): 10.0, (3, 2): 0.1, (1, 2, 4): -7.0}
BAD_WORDS = [[4], [59], [3, 59], [1, 5], [1, 1], [2, 2, 2]]

PROCESSORS = [
    Case("repetition", SamplingOptions(repetition_penalty=1.3), lambda t, _: [t.RepetitionPenaltyLogitsProcessor(1.3)]),
    Case("encouraged", SamplingOptions(repetition_penalty=0.7), lambda t, _: [t.RepetitionPenaltyLogitsProcessor(0.7)]),
    *(
        Case(
            f"{size}-grams",
            SamplingOptions(no_repeat_ngram_size=size),
            lambda t, _, size=size: [t.NoRepeatNGramLogitsProcessor(size)],
        )
        for size in (1, 2, 3, 4, 13)
    ),
    Case("bias", SamplingOptions(sequence_bias=BIAS), lambda t, _: [t.SequenceBiasLogitsProcessor(BIAS)]),
    Case(
        "bad words",
        SamplingOptions(bad_words_ids=BAD_WORDS),
        lambda t, _: [t.NoBadWordsLogitsProcessor(BAD_WORDS, EOS_IDS)],
    ),
    Case(
        "min_new_tokens",
        SamplingOptions(),
        lambda t, prompt: [t.MinNewTokensLengthLogitsProcessor(prompt, 4, EOS_IDS)],
        min_new_tokens=4,
    ),
    Case(
        "all in transformers' order",
        SamplingOptions(sequence_bias=BIAS, repetition_penalty=1.3, no_repeat_ngram_size=3, bad_words_ids=BAD_WORDS),
        lambda t, prompt: [
            t.SequenceBiasLogitsProcessor(BIAS),
            t.RepetitionPenaltyLogitsProcessor(1.3),
            t.NoRepeatNGramLogitsProcessor(3),
            t.NoBadWordsLogitsProcessor(BAD_WORDS, EOS_IDS),
            t.MinNewTokensLengthLogitsProcessor(prompt, 4, EOS_IDS),
        ],
        min_new_tokens=4,
    ),
]

WARPERS = [
    Case("temperature", SamplingOptions(top_k=0, temperature=0.7), lambda t, _: [t.TemperatureLogitsWarper(0.7)]),
    Case("top_k", SamplingOptions(top_k=7), lambda t, _: [t.TopKLogitsWarper(7)]),
    *(
        Case(f"top_p {p}", SamplingOptions(top_k=0, top_p=p), lambda t, _, p=p: [t.TopPLogitsWarper(p)])
        for p in (0.05, 0.5, 0.9, 0.99)
    ),
    *(
        Case(f"min_p {p}", SamplingOptions(top_k=0, min_p=p), lambda t, _, p=p: [t.MinPLogitsWarper(p)])
        for p in (0.01, 0.2, 1.0)
    ),
    *(
        Case(f"typical_p {p}", SamplingOptions(top_k=0, typical_p=p), lambda t, _, p=p: [t.TypicalLogitsWarper(p)])
        for p in (0.05, 0.2, 0.5, 0.9, 0.99)
    ),
    Case(
        "all in transformers' order",
        SamplingOptions(temperature=1.4, top_k=30, top_p=0.9, min_p=0.02, typical_p=0.7),
        lambda t, _: [
            t.TemperatureLogitsWarper(1.4),
            t.TopKLogitsWarper(30),
            t.TopPLogitsWarper(0.9),
            t.MinPLogitsWarper(0.02),
            t.TypicalLogitsWarper(0.7),
        ],
    ),
]


def by_transformers(torch: Any, processors: list[Any], logits: Float32Array, ids: NDArray[np.int64]) -> Float32Array:
    scores = torch.tensor(logits[None])
    for processor in processors:
        scores = processor(torch.tensor(ids[None]), scores)
    result: Float32Array = scores[0].numpy()
    return result


@pytest.mark.parametrize("case", PROCESSORS, ids=lambda case: case.name)
def test_processor_equals_transformers(case: Case, transformers: Any, torch: Any) -> None:
    processors = LogitsProcessors(case.options, n_vocab=N_VOCAB, eos_ids=EOS_IDS, min_new_tokens=case.min_new_tokens)
    changed = 0
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        period = rng.choice([1, 1, 2, 2, 3, 4, 9, 59], size=rng.integers(1, 30))
        ids = np.resize(period, rng.integers(1, 40))
        prompt = int(rng.integers(1, len(ids) + 1))
        logits = rng.normal(scale=3, size=N_VOCAB).astype(np.float32)
        ours = processors.apply(logits, ids=ids.tolist(), prompt_length=prompt)
        np.testing.assert_allclose(
            ours, by_transformers(torch, case.classes(transformers, prompt), logits, ids), rtol=ROUNDING
        )
        changed += not np.array_equal(ours, logits)
    assert changed  # else two implementations that do nothing would agree


@pytest.mark.parametrize("n_vocab", [N_VOCAB, 5000])
@pytest.mark.parametrize("case", WARPERS, ids=lambda case: case.name)
def test_warper_equals_transformers(case: Case, n_vocab: int, transformers: Any, torch: Any) -> None:
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        logits = rng.normal(scale=rng.choice([0.5, 3, 10]), size=n_vocab).astype(np.float32)
        logits[rng.random(n_vocab) < 0.2] = -np.inf
        theirs = by_transformers(torch, case.classes(transformers, 1), logits, np.array([1]))
        np.testing.assert_allclose(warp_logits(logits, case.options), theirs, rtol=ROUNDING)
