"""The folder as it is, in transformers.js: in Node, on onnxruntime's native build, and in the browser's WebAssembly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.package import open_package
from runtime.text_generator import open_decoder

from .compatibility import SAME, TIES, Compatibility, column_of
from .conftest import (
    NEW_TOKENS,
    PROMPTS,
    assert_ours_but_for_ties,
    encode,
    file_digests,
    our_greedy_ids,
    our_logits,
)
from .programs import as_logits, in_node, npm_version, require

ANSWERS = ("greedy", "batch", "logits", "tokenize")

SAME_KERNELS = 1e-5
"""Between logits of two versions of onnxruntime on one processor. Measured: 0, of 1.30 beside 1.32."""


@pytest.fixture(scope="module")
def client() -> str:
    require("node")
    return f"transformers.js {npm_version('@huggingface/transformers')}, Node"


@pytest.fixture(scope="module")
def answers(client: str, package: Path) -> Mapping[str, Any]:
    before = file_digests(package)
    answered = in_node(package, ANSWERS, encode(package), NEW_TOKENS, texts=PROMPTS)
    assert file_digests(package) == before
    return answered


def test_a_prompt_is_continued_as_we_do(
    client: str, package: Path, answers: Mapping[str, Any], compatibility: Compatibility
) -> None:
    assert answers["greedy"] == our_greedy_ids(package, encode(package))
    compatibility.tell(client, "greedy", column_of(open_package(package).manifest))


def test_a_left_padded_batch_is_continued_as_we_do(
    client: str, package: Path, answers: Mapping[str, Any], compatibility: Compatibility
) -> None:
    """Quantized but for ties: keys that the mask hides reorder sums."""
    manifest = open_package(package).manifest
    if manifest.precision == "fp32":
        assert answers["batch"] == our_greedy_ids(package, encode(package))
    else:
        assert_ours_but_for_ties(package, encode(package), answers["batch"])
    how = SAME if manifest.precision == "fp32" else TIES
    compatibility.tell(client, "left-padded batch", column_of(manifest), how)


def test_logits_are_ours(package: Path, answers: Mapping[str, Any]) -> None:
    decoder = open_decoder(open_package(package))
    for prompt, encoded in zip(encode(package), answers["logits"], strict=True):
        theirs = as_logits(encoded, len(prompt))
        assert np.abs(theirs - our_logits(decoder, prompt)).max() <= SAME_KERNELS


def test_its_tokenizer_reads_the_same_ids(
    client: str, package: Path, answers: Mapping[str, Any], compatibility: Compatibility
) -> None:
    assert answers["tokenize"] == [ids.tolist() for ids in encode(package)]
    compatibility.tell(client, "tokenizer", column_of(open_package(package).manifest))
