"""Whole texts by transformers' generate, and by ours with the fp32 package: greedy, with options, by beam search.

transformers is given batches of 1 to 8 prompts of mixed lengths, padded on the left; ours runs greedy prompts in the
same batches, each row at its own length, and searches beams prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.beam_search import Beam, BeamSearchOptions, search_beams
from runtime.log_probabilities import TokenLogProbability, log_probabilities
from runtime.logits_processors import LogitsProcessors
from runtime.sampling import SamplingOptions, warp_logits
from runtime.text_generator import TextGenerator
from tests.conftest import DEMO_CHECKPOINT

from .conftest import PROMPTS

N_PROMPTS = 50
NEW_TOKENS = 24

SCORE_ERROR = 1e-4
"""Of a sum of NEW_TOKENS log-probabilities, relative. Measured: 3e-6."""

LOG_PROBABILITY_ERROR = 1e-3
"""Measured: 3e-5."""

COMMA, SPACE_THE = 11, 262
"""Ids that end texts soon where they are end ids too."""

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class Both:
    """The demo model here and there, and what both are asked to continue."""

    generator: TextGenerator
    model: Any
    torch: Any
    prompts: list[Int64Array]


@pytest.fixture(scope="module")
def both(demo_fp32: Path, transformers: Any, torch: Any) -> Both:
    """Prompts are pieces of 1 to 60 tokens out of a text."""
    generator = TextGenerator.load(demo_fp32)
    model = transformers.GPT2LMHeadModel.from_pretrained(DEMO_CHECKPOINT, dtype="float32").eval()
    ids, rng = generator.tokenizer.encode("\n\n".join(PROMPTS)), np.random.default_rng(0)
    pieces = [(int(rng.integers(0, len(ids) - 60)), int(rng.integers(1, 61))) for _ in range(N_PROMPTS)]
    return Both(generator, model, torch, [ids[start : start + length] for start, length in pieces])


def batches(prompts: list[Int64Array]) -> Iterator[list[Int64Array]]:
    """All prompts, in batches of 1, 2, ... 8, 1, 2, ..."""
    start, size = 0, 1
    while start < len(prompts):
        yield prompts[start : start + size]
        start, size = start + size, size % 8 + 1


def by_transformers(both: Both, batch: list[Int64Array], **options: Any) -> Any:
    """What generate returns for prompts that are padded on the left, its sequences without the prompts."""
    width = max(map(len, batch))
    pad_id = both.model.config.eos_token_id
    ids = np.stack([np.pad(prompt, (width - len(prompt), 0), constant_values=pad_id) for prompt in batch])
    mask = np.stack([np.arange(width) >= width - len(prompt) for prompt in batch]).astype(np.int64)
    with both.torch.inference_mode():
        given = both.model.generate(
            both.torch.tensor(ids),
            attention_mask=both.torch.tensor(mask),
            max_new_tokens=NEW_TOKENS,
            pad_token_id=pad_id,
            return_dict_in_generate=True,
            **{"do_sample": False} | options,
        )
    given.sequences = given.sequences[:, width:].tolist()
    return given


def cut(ids: list[int], eos_ids: list[int]) -> list[int]:
    """Ids up to the first end id, which is kept."""
    end = next((place for place, token_id in enumerate(ids) if token_id in eos_ids), len(ids))
    return ids[: end + 1]


def our_greedy(both: Both, batch: list[Int64Array]) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in batch]
    for chosen in both.generator.steps(batch, max_new_tokens=NEW_TOKENS, sampling=SamplingOptions.greedy()):
        for row, token_id in chosen.items():
            texts[row].append(token_id)
    return texts


def our_beams(both: Both, prompt: Int64Array, beams: BeamSearchOptions, **options: Any) -> list[Beam]:
    eos_ids, min_new_tokens = options.pop("eos_token_id"), options.pop("min_new_tokens", 0)
    found = search_beams(
        both.generator.decoder,
        prompt,
        beams=beams,
        sampling=SamplingOptions(do_sample=False, **options),
        n_vocab=both.generator.tokenizer.n_vocab,
        eos_ids=eos_ids,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=min_new_tokens,
        num_return_sequences=beams.num_beams,
    )
    return list(found)


def test_greedy_equals_transformers(both: Both) -> None:
    eos_ids = [both.generator.config.eos_token_id]
    for batch in batches(both.prompts):
        theirs = by_transformers(both, batch).sequences
        assert our_greedy(both, batch) == [cut(ids, eos_ids) for ids in theirs]


@pytest.mark.parametrize(
    ("num_beams", "length_penalty", "early_stopping", "more_ends"),
    [(4, 1.0, False, [COMMA]), (2, 0.5, "never", [COMMA, SPACE_THE]), (3, 2.0, True, [COMMA]), (5, -0.6, False, [])],
)
def test_beam_search_equals_transformers(
    num_beams: int, length_penalty: float, early_stopping: Any, more_ends: list[int], both: Both
) -> None:
    beams = BeamSearchOptions(num_beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping)
    eos_ids = [both.generator.config.eos_token_id, *more_ends]
    lengths = set()
    for batch in batches(both.prompts):
        theirs = by_transformers(
            both,
            batch,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos_token_id=eos_ids,
            output_scores=True,
        )
        ours = [beam for prompt in batch for beam in our_beams(both, prompt, beams, eos_token_id=eos_ids)]
        assert [list(beam.ids) for beam in ours] == [cut(ids, eos_ids) for ids in theirs.sequences]
        np.testing.assert_allclose([beam.score for beam in ours], theirs.sequences_scores, rtol=SCORE_ERROR)
        lengths.update(len(beam.ids) for beam in ours)
    assert len(lengths) > 1 or not more_ends


OPTIONS = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[COMMA], [SPACE_THE, 13]]},
    {"sequence_bias": {(COMMA,): 2.0, (SPACE_THE, 13): 5.0}},
    {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "min_new_tokens": 9, "eos_token_id": [COMMA, SPACE_THE]},
]


@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
def test_options_equal_transformers_greedily(options: dict[str, Any], both: Both) -> None:
    """Prompts alone: transformers penalizes the padding of a batch too."""
    plain = {name: value for name, value in options.items() if name not in ("eos_token_id", "min_new_tokens")}
    eos_ids = options.get("eos_token_id", [both.generator.config.eos_token_id])
    processors = LogitsProcessors(
        SamplingOptions(**plain),
        n_vocab=both.generator.tokenizer.n_vocab,
        eos_ids=eos_ids,
        min_new_tokens=options.get("min_new_tokens", 0),
    )
    changed = 0
    for prompt in both.prompts[:10]:
        theirs = cut(by_transformers(both, [prompt], **options).sequences[0], eos_ids)
        ours = both.generator.generate(
            prompt,
            max_new_tokens=NEW_TOKENS,
            sampling=SamplingOptions.greedy(),
            logits_processor=partial(
                lambda length, ids, logits: processors.apply(logits, ids=ids, prompt_length=length), len(prompt)
            ),
        )
        assert cut(list(ours.samples[0].ids), eos_ids) == theirs
        changed += theirs != our_greedy(both, [prompt])[0]
    assert changed


@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
def test_options_equal_transformers_in_beam_search(options: dict[str, Any], both: Both) -> None:
    beams = BeamSearchOptions(num_beams=3)
    given = {"eos_token_id": [both.generator.config.eos_token_id, 13]} | options
    for prompt in both.prompts[10:18]:
        theirs = by_transformers(both, [prompt], num_beams=3, num_return_sequences=3, **given).sequences
        ours = our_beams(both, prompt, beams, **given)
        assert [list(beam.ids) for beam in ours] == [cut(ids, given["eos_token_id"]) for ids in theirs]


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "as drawn from"])
def test_log_probabilities_equal_transformers(raw: bool, both: Both) -> None:
    """transformers draws; our logits behind what it drew must give its tokens its probabilities."""
    both.torch.manual_seed(0)
    sampling = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2}
    processors = LogitsProcessors(SamplingOptions(**sampling), n_vocab=both.generator.tokenizer.n_vocab)
    for prompt in both.prompts[18:24]:
        drawn = by_transformers(both, [prompt], do_sample=True, output_scores=True, output_logits=True, **sampling)
        ids = np.concatenate([prompt, drawn.sequences[0]])
        rows = np.concatenate([piece.copy() for piece in both.generator.decoder.logits(ids[:-1])])[len(prompt) - 1 :]
        for place, (logits, theirs) in enumerate(zip(rows, drawn.logits if raw else drawn.scores, strict=True)):
            so_far = ids[: len(prompt) + place]
            if not raw:
                processed = processors.apply(logits, ids=so_far, prompt_length=len(prompt))
                logits = warp_logits(processed, SamplingOptions(**sampling))  # noqa: PLW2901
            check(log_probabilities(logits, int(ids[len(so_far)]), top=5), theirs[0].log_softmax(-1).numpy())


def check(ours: TokenLogProbability, theirs: NDArray[np.float32]) -> None:
    assert ours.log_probability == pytest.approx(theirs[ours.token_id], abs=LOG_PROBABILITY_ERROR)
    ranked = np.sort(theirs[theirs > -np.inf])[::-1][:5]
    np.testing.assert_allclose([value for _, value in ours.top], ranked, atol=LOG_PROBABILITY_ERROR)
    np.testing.assert_allclose([value for _, value in ours.top], theirs[[token for token, _ in ours.top]], atol=1e-3)
