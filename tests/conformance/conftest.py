"""The other clients, and what each of them is asked to continue.

A client that is not installed skips its tests, unless GPT2_EDGE_REQUIRE_CLIENTS is 1: then it fails them.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.decoder import CHUNK_TOKENS, Decoder
from runtime.sampling import SamplingOptions
from runtime.text_generator import TextGenerator

REQUIRE_CLIENTS = "GPT2_EDGE_REQUIRE_CLIENTS"

NEW_TOKENS = 64

PROMPTS = (
    "It",
    "The old",
    "He was not",
    "“I do not know,” said",
    "In the year 1805, on the",
    "The captain looked at the sea, and the sea",
    "My dear sister,\n\nI have received your letter of the 12th, and",
    "There was once a poor man who had three sons. When he felt that his end was near, he called them",
    "It is a truth which nobody has ever doubted, that a house by the river is damp in winter; but whoever has lived "
    "in one will tell you that in summer there is nothing",
    "Chapter 4\n\nThe rain had stopped. From the window she could see the road, the bridge and beyond it the long grey "
    "wall of the garden, where the two gentlemen were still walking up and down as if they had not noticed the weather "
    "at all. “They will be ill,” she thought, and turned to",
)
"""From one token to a hundred, so that a batch of them is ragged."""

FileDigests = dict[str, str]


@pytest.fixture(scope="session")
def torch() -> Any:
    return import_client("torch")


@pytest.fixture(scope="session")
def transformers(torch: Any) -> Any:
    return import_client("transformers")


@pytest.fixture(scope="session")
def optimum(torch: Any) -> Any:
    return import_client("optimum.onnxruntime")


@pytest.fixture(scope="session")
def genai() -> Any:
    return import_client("onnxruntime_genai")


@pytest.fixture(params=["fp32", "int8"])
def package(request: pytest.FixtureRequest) -> Path:
    """The demo package in each precision."""
    folder: Path = request.getfixturevalue(f"demo_{request.param}")
    return folder


def encode(package: Path, texts: tuple[str, ...] = PROMPTS) -> list[NDArray[np.int64]]:
    """The texts' ids, by our own tokenizer."""
    tokenizer = TextGenerator.load(package).tokenizer
    return [tokenizer.encode(text) for text in texts]


def our_greedy_ids(package: Path, prompts: list[NDArray[np.int64]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """What our runtime writes after each prompt, without the end-of-text that may have ended it."""
    generator = TextGenerator.load(package)
    return [
        list(generator.generate(prompt, max_new_tokens=new_tokens, sampling=SamplingOptions.greedy()).samples[0].ids)
        for prompt in prompts
    ]


def greedy_batch(
    decoder: Decoder, prompts: list[NDArray[np.int64]], new_tokens: int, *, chunk_tokens: int = CHUNK_TOKENS
) -> NDArray[np.int64]:
    """The greedy ids [B, new_tokens] of prompts that are decoded together, each row at its own length."""
    decoding = decoder.start(batch=len(prompts), capacity=max(map(len, prompts)) + new_tokens)
    prefilled = [decoding.prefill(row, ids, chunk_tokens=chunk_tokens).argmax() for row, ids in enumerate(prompts)]
    steps = [np.array(prefilled, np.int64)]
    while len(steps) < new_tokens:
        steps.append(decoding.decode_step(steps[-1]).argmax(axis=-1))
    return np.stack(steps, axis=1)


def file_digests(package: Path) -> FileDigests:
    """sha256 of every file of a folder, by its path in it."""
    return {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(package.rglob("*"))
        if path.is_file()
    }


def import_client(name: str) -> Any:
    if os.environ.get(REQUIRE_CLIENTS) == "1":
        return importlib.import_module(name)
    return pytest.importorskip(
        name, reason=f"{name} is not installed: pip install 'gpt2-edge[conformance]', or run scripts/test"
    )
