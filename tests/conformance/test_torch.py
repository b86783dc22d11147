"""Greedy ids of the fp32 package against transformers' GPT2LMHeadModel, on trained and on full-size random weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.convert import convert
from runtime.decoder import Decoder
from runtime.package import open_package
from runtime.text_generator import open_decoder
from tests.conftest import DEMO_CHECKPOINT

from .conftest import NEW_TOKENS, encode, greedy_batch, our_greedy_ids

CHUNK_TOKENS = 7
"""A small piece of a prompt, and no divisor of anything here."""

LARGEST_ERROR = 2e-5
"""Between two correct float32 implementations, in logits. Measured: 1e-5 at most (random 124M against the oracle)."""

PROMPT_LENGTHS = (1, 2, 3, 7, 12, 20, 33, 64, 100, 150)

Int64Array = NDArray[np.int64]


@pytest.fixture(scope="module")
def demo_prompts(demo_fp32: Path) -> list[Int64Array]:
    return encode(demo_fp32)


@pytest.fixture(scope="module")
def demo_by_torch(transformers: Any, torch: Any, demo_prompts: list[Int64Array]) -> list[list[int]]:
    """What transformers writes after each prompt of the demo checkpoint."""
    model = transformers.GPT2LMHeadModel.from_pretrained(DEMO_CHECKPOINT, dtype="float32").eval()
    return [_generate(torch, model, prompt) for prompt in demo_prompts]


@pytest.fixture(scope="module")
def random_124m(
    random_124m_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, transformers: Any
) -> Iterator[tuple[Decoder, Any]]:
    """124M of random weights, as our package and as torch's model; the package is gone as soon as it was read."""
    folder = tmp_path_factory.mktemp("random-124M")
    package = convert(random_124m_checkpoint, folder / "package", precision="fp32").package
    decoder = open_decoder(open_package(package))
    model = transformers.GPT2LMHeadModel.from_pretrained(random_124m_checkpoint).eval()
    yield decoder, model
    del decoder, model
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def random_prompts() -> list[Int64Array]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 50257, length) for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def random_greedy(random_124m: tuple[Decoder, Any], random_prompts: list[Int64Array]) -> Int64Array:
    """What our runtime wrote after each prompt, all of them decoded together, [10, NEW_TOKENS]."""
    return greedy_batch(random_124m[0], random_prompts, NEW_TOKENS)


def test_demo_continues_as_in_torch(
    demo_fp32: Path, demo_prompts: list[Int64Array], demo_by_torch: list[list[int]]
) -> None:
    assert our_greedy_ids(demo_fp32, demo_prompts) == demo_by_torch


def test_demo_prefilled_in_pieces_continues_as_in_torch(
    demo_fp32: Path, demo_prompts: list[Int64Array], demo_by_torch: list[list[int]]
) -> None:
    decoder = open_decoder(open_package(demo_fp32))
    alone = [greedy_batch(decoder, [prompt], NEW_TOKENS, chunk_tokens=CHUNK_TOKENS) for prompt in demo_prompts]
    assert np.concatenate(alone).tolist() == demo_by_torch


def test_demo_ragged_batch_continues_as_in_torch(
    demo_fp32: Path, demo_prompts: list[Int64Array], demo_by_torch: list[list[int]]
) -> None:
    assert len(set(map(len, demo_prompts))) == len(demo_prompts)
    rows = greedy_batch(open_decoder(open_package(demo_fp32)), demo_prompts, NEW_TOKENS)
    assert rows.tolist() == demo_by_torch


@pytest.fixture(scope="module")
def random_by_torch(
    random_124m: tuple[Decoder, Any], random_prompts: list[Int64Array], random_greedy: Int64Array, torch: Any
) -> list[NDArray[np.float32]]:
    """The logits from which torch would have chosen each id of `random_greedy`, [N, V] for each prompt.

    One pass over prompt and continuation tells as much as torch's own generation, which takes minutes: if each id is
    torch's choice after all before it, the whole is what torch would have written.
    """
    by_torch = []
    for prompt, row in zip(random_prompts, random_greedy, strict=True):
        with torch.inference_mode():
            logits = random_124m[1](torch.tensor(np.concatenate([prompt, row[:-1]]))[None]).logits[0]
        by_torch.append(logits.numpy()[len(prompt) - 1 :])
    return by_torch


def test_random_124m_ragged_batch_continues_as_in_torch(
    random_greedy: Int64Array, random_by_torch: list[NDArray[np.float32]]
) -> None:
    assert random_greedy.tolist() == [logits.argmax(axis=-1).tolist() for logits in random_by_torch]


@pytest.mark.parametrize("chunk_tokens", [CHUNK_TOKENS, 1024], ids=["pieces", "one run"])
def test_random_124m_prefilled_chooses_as_torch(
    random_124m: tuple[Decoder, Any], random_prompts: list[Int64Array], random_greedy: Int64Array, chunk_tokens: int
) -> None:
    """`random_greedy` is torch's choice, says the test above; here all positions are run as a prompt is."""
    decoder, _ = random_124m
    for prompt, row in zip(random_prompts, random_greedy, strict=True):
        sequence = np.concatenate([prompt, row[:-1]])
        pieces = decoder.logits(sequence, chunk_tokens=chunk_tokens)
        chosen = np.concatenate([logits.argmax(axis=-1) for logits in pieces])
        assert chosen[len(prompt) - 1 :].tolist() == row.tolist()


def test_random_124m_decoded_alone_continues_as_in_the_batch(
    random_124m: tuple[Decoder, Any], random_prompts: list[Int64Array], random_greedy: Int64Array
) -> None:
    alone = greedy_batch(random_124m[0], random_prompts[4:5], NEW_TOKENS)
    np.testing.assert_array_equal(alone, random_greedy[4:5])


def test_no_choice_here_is_a_matter_of_rounding(
    random_greedy: Int64Array, random_by_torch: list[NDArray[np.float32]]
) -> None:
    """Else equal ids would be luck, and unequal ones no fault: take another seed."""
    for row, logits in zip(random_greedy, random_by_torch, strict=True):
        second, first = np.partition(logits, -2, axis=-1)[:, -2:].T
        assert (first - second).min() > 2 * LARGEST_ERROR
        assert len(set(row.tolist())) > NEW_TOKENS // 4


def _generate(torch: Any, model: Any, prompt: Int64Array) -> list[int]:
    ids = torch.tensor(prompt[None])
    with torch.inference_mode():
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=model.config.eos_token_id,
        )
    new: list[int] = written[0, len(prompt) :].tolist()
    return new
