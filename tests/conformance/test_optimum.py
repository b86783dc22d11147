"""The folder as it is, in optimum's ORTModelForCausalLM: the same files, the same greedy ids, nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.package import MODEL_FILES, open_package
from runtime.text_generator import TextGenerator
from tests.conftest import DEMO_CHECKPOINT

from .compatibility import SAME, TIES, Compatibility, column_of
from .conftest import NEW_TOKENS, assert_ours_but_for_ties, encode, file_digests, our_greedy_ids, version_of

Int64Array = NDArray[np.int64]

CLIENT = f"optimum-onnx {version_of('optimum-onnx')}, transformers {version_of('transformers')}"

BEAMS, BEAM_TOKENS = 4, 24

BEAM_SCORE = {"fp32": 1e-3, "int8": 0.3, "int4": 0.3}
"""Between a beam's log-probability there, summed while four beams ran together, and here in one run. Measured: fp32
2e-5, int8 0.05, int4 0.09; a beam that took another's keys would be off by several."""


@pytest.fixture(scope="module")
def model(package: Path, optimum: Any, torch: Any) -> Any:
    return optimum.ORTModelForCausalLM.from_pretrained(package)


def test_a_prompt_is_continued_as_we_do(package: Path, model: Any, torch: Any, compatibility: Compatibility) -> None:
    """Quantized too: both run the prompt whole, then one token at a time, so every sum has the same order."""
    prompts = encode(package)
    written = [optimum_ids(torch, model, [prompt])[0] for prompt in prompts]
    assert written == our_greedy_ids(package, prompts)
    compatibility.tell(CLIENT, "greedy", column_of(open_package(package).manifest))


def test_a_batch_without_padding_is_continued_as_we_do(package: Path, model: Any, torch: Any) -> None:
    prompts = [prompt[:7] for prompt in encode(package) if len(prompt) >= 7]
    written = optimum_ids(torch, model, prompts)
    if open_package(package).manifest.precision == "int4":  # its products depend on how many rows there are
        assert_ours_but_for_ties(package, prompts, written)
    else:
        assert written == our_greedy_ids(package, prompts)


def test_a_left_padded_batch_is_continued_as_we_do(
    package: Path, model: Any, torch: Any, compatibility: Compatibility
) -> None:
    """Quantized but for ties: keys that the mask hides reorder sums."""
    manifest = open_package(package).manifest
    prompts = encode(package)
    written = optimum_ids(torch, model, prompts)
    if manifest.precision == "fp32":
        assert written == our_greedy_ids(package, prompts)
    else:
        assert_ours_but_for_ties(package, prompts, written)
    how = SAME if manifest.precision == "fp32" else TIES
    compatibility.tell(CLIENT, "left-padded batch", column_of(manifest), how)


def test_beams_have_the_probability_that_they_have_here(
    package: Path, model: Any, torch: Any, compatibility: Compatibility
) -> None:
    """A beam search moves rows of keys and values about; its log-probability tells whether it took the right ones."""
    manifest, generator = open_package(package).manifest, TextGenerator.load(package)
    for prompt in encode(package):
        ids, score = _best_beam(torch, model, prompt)
        ours = generator.score([*prompt, *ids])[len(prompt) - 1 :].sum()
        assert abs(score - ours) <= BEAM_SCORE[manifest.precision]
    compatibility.tell(CLIENT, f"beam search, {BEAMS} beams", column_of(manifest), "same probability")


def test_fp32_beams_are_those_of_torch(demo_fp32: Path, optimum: Any, torch: Any, transformers: Any) -> None:
    model = optimum.ORTModelForCausalLM.from_pretrained(demo_fp32)
    reference = transformers.GPT2LMHeadModel.from_pretrained(DEMO_CHECKPOINT, dtype="float32").eval()
    for prompt in encode(demo_fp32)[-2:]:
        assert _best_beam(torch, model, prompt)[0] == _best_beam(torch, reference, prompt)[0]


@pytest.mark.parametrize("named", [False, True], ids=["found", "named"])
def test_the_file_that_runs_is_ours_and_stays_as_it_was(package: Path, optimum: Any, torch: Any, named: bool) -> None:
    before = file_digests(package)
    model_file = MODEL_FILES[open_package(package).manifest.precision]
    names = {"file_name": Path(model_file).name} if named else {}
    model = optimum.ORTModelForCausalLM.from_pretrained(package, **names)
    assert Path(model.path) == package / model_file
    optimum_ids(torch, model, [np.array([1, 2, 3])])
    assert file_digests(package) == before


def optimum_ids(torch: Any, model: Any, prompts: list[Int64Array], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """What is written after each prompt, greedily, all in one batch that is padded on the left."""
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), model.config.eos_token_id)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    written = model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        top_k=None,
        temperature=None,
        max_new_tokens=new_tokens,
    )
    new: list[list[int]] = written[:, longest:].tolist()
    return new


def _best_beam(torch: Any, model: Any, prompt: Int64Array) -> tuple[list[int], float]:
    """The ids of the most probable beam after a prompt, and the sum of their log-probabilities."""
    ids = torch.tensor(prompt[None])
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        top_k=None,
        temperature=None,
        num_beams=BEAMS,
        length_penalty=0.0,
        max_new_tokens=BEAM_TOKENS,
        pad_token_id=model.config.eos_token_id,
        return_dict_in_generate=True,
        output_scores=True,
    )
    return result.sequences[0, len(prompt) :].tolist(), float(result.sequences_scores[0])
