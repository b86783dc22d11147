"""124M, all of its weights random, in every client: what runs a tiny model must also hold 500 MB, and 50,257 tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export.convert import convert
from runtime import SamplingOptions, TextGenerator
from runtime.package import CacheType, Precision, open_package

from .compatibility import SAME, TIES, Compatibility, column_of
from .conftest import PROMPTS, assert_ours_but_for_ties, encode, our_greedy_ids
from .programs import in_chromium, in_node, jobs, npm_version, require
from .test_cpp import CLIENT as CPP
from .test_genai import CLIENT as GENAI
from .test_genai import genai_ids
from .test_optimum import CLIENT as OPTIMUM
from .test_optimum import optimum_ids

TEXTS = (PROMPTS[1], PROMPTS[4], PROMPTS[-1])
NEW_TOKENS = 16
ASKED = "124M of random weights: greedy"

SMALLEST_SHARE = 0.9
"""Of the ids that are ours where sums have another order: random weights make many near ties."""

KINDS: tuple[tuple[Precision, CacheType], ...] = (
    ("fp32", "float32"),
    ("int8", "float32"),
    ("int4", "float32"),
    ("int8", "int8"),
)

Int64Array = NDArray[np.int64]


@pytest.fixture(scope="module", params=KINDS, ids=["fp32", "int8", "int4", "int8_kv8"])
def package(
    request: pytest.FixtureRequest, random_124m_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A package of each kind, calibrated on little, for nobody reads what it writes; one at a time on the disk."""
    precision, kv_cache = request.param
    folder = tmp_path_factory.mktemp("124M")
    calibration = folder / "text.txt"
    calibration.write_text("\n".join(PROMPTS * 3), encoding="utf-8")
    yield convert(
        random_124m_checkpoint,
        folder / "package",
        precision=precision,
        kv_cache=kv_cache,
        allow_loss=True,
        calibration=None if precision == "fp32" else calibration,
    ).package
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def prompts(package: Path) -> list[Int64Array]:
    return encode(package, TEXTS)


@pytest.fixture(scope="module")
def ours(package: Path, prompts: list[Int64Array]) -> list[list[int]]:
    return our_greedy_ids(package, prompts, NEW_TOKENS)


def test_in_optimum(
    package: Path, prompts: list[Int64Array], ours: list[list[int]], request: pytest.FixtureRequest
) -> None:
    torch, optimum = (request.getfixturevalue(name) for name in ("torch", "optimum"))
    model = optimum.ORTModelForCausalLM.from_pretrained(package)
    assert [optimum_ids(torch, model, [prompt], NEW_TOKENS)[0] for prompt in prompts] == ours
    _check_a_padded_batch(package, prompts, optimum_ids(torch, model, prompts, NEW_TOKENS), ours)
    _tell(request, OPTIMUM, package)


def test_in_genai(
    package: Path, prompts: list[Int64Array], ours: list[list[int]], request: pytest.FixtureRequest
) -> None:
    genai = request.getfixturevalue("genai")
    model = genai.Model(str(package))
    assert [genai_ids(genai, model, [prompt], NEW_TOKENS) for prompt in prompts] == ours
    _tell(request, GENAI, package)


def test_in_cpp(package: Path, cpp_generate: Callable[..., str], request: pytest.FixtureRequest) -> None:
    generator = TextGenerator.load(package)
    ours = generator.generate(TEXTS[1], max_new_tokens=NEW_TOKENS, sampling=SamplingOptions.greedy())
    assert cpp_generate(package, TEXTS[1], "--greedy", "--new-tokens", NEW_TOKENS) == ours.text + "\n"
    _tell(request, CPP, package)


def test_in_node(
    package: Path, prompts: list[Int64Array], ours: list[list[int]], request: pytest.FixtureRequest
) -> None:
    require("node")
    answer = in_node(package, ("greedy", "batch", "tokenize"), prompts, NEW_TOKENS, texts=TEXTS)
    assert answer["greedy"] == ours
    assert answer["tokenize"] == [prompt.tolist() for prompt in prompts]
    _check_a_padded_batch(package, prompts, answer["batch"], ours)
    _tell(request, f"transformers.js {npm_version('@huggingface/transformers')}, Node", package)


def test_in_chromium(
    package: Path, prompts: list[Int64Array], ours: list[list[int]], request: pytest.FixtureRequest
) -> None:
    require("node", "chromium")
    step = {"jobs": jobs(package, ["greedy"], prompts[:2], NEW_TOKENS)}
    written = in_chromium([package], {"alone": step})["steps"]["alone"]["greedy"]
    _check_a_padded_batch(package, prompts[:2], written, ours[:2])
    how = SAME if open_package(package).manifest.precision == "fp32" else TIES
    _tell(request, f"transformers.js {npm_version('@huggingface/transformers')}, Chromium", package, how)


def _check_a_padded_batch(
    package: Path, prompts: list[Int64Array], written: list[list[int]], ours: list[list[int]]
) -> None:
    """Our ids in fp32; quantized ours but for ties, for sums have another order there."""
    if open_package(package).manifest.precision == "fp32":
        assert written == ours
    else:
        assert_ours_but_for_ties(package, prompts, written, smallest_share=SMALLEST_SHARE)


def _tell(request: pytest.FixtureRequest, client: str, package: Path, how: str = SAME) -> None:
    compatibility: Compatibility = request.getfixturevalue("compatibility")
    compatibility.tell(client, ASKED, column_of(open_package(package).manifest), how)
