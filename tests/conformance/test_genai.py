"""The folder as it is, in onnxruntime-genai: one shared cache buffer, appended to and rewound.

Its runs have the shapes of ours, so the ids are equal in int8 too: prompts in pieces of two tokens or more, then one
token at a time. 4-bit products of another number of rows are summed in another order: with int4, a prompt in pieces is
continued with our ids but for ties.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.package import GENAI_CONFIG, open_package

from .compatibility import SAME, TIES, Compatibility, column_of
from .conftest import (
    NEW_TOKENS,
    PROMPTS,
    assert_ours_but_for_ties,
    encode,
    file_digests,
    our_greedy_ids,
    version_of,
)

Int64Array = NDArray[np.int64]

CLIENT = f"onnxruntime-genai {version_of('onnxruntime-genai')}, Python"


@pytest.fixture(scope="module")
def model(package: Path, genai: Any) -> Any:
    return genai.Model(str(package))


def test_a_prompt_is_continued_as_we_do(package: Path, model: Any, genai: Any, compatibility: Compatibility) -> None:
    prompts = encode(package)
    written = [genai_ids(genai, model, [prompt]) for prompt in prompts]
    assert written == our_greedy_ids(package, prompts)
    compatibility.tell(CLIENT, "greedy, shared buffer", column_of(open_package(package).manifest))


def test_the_buffer_is_shared(package: Path) -> None:
    assert json.loads((package / GENAI_CONFIG).read_text(encoding="utf-8"))["search"]["past_present_share_buffer"]


def test_a_prompt_in_two_parts_is_continued_as_we_do(
    package: Path, model: Any, genai: Any, compatibility: Compatibility
) -> None:
    prompts = [prompt for prompt in encode(package) if len(prompt) >= 4]
    written = [genai_ids(genai, model, [prompt[:-2], prompt[-2:]]) for prompt in prompts]
    compatibility.tell(CLIENT, "a prompt in two parts", *_held(package, prompts, written))


def test_a_rewound_prompt_is_continued_as_we_do(
    package: Path, model: Any, genai: Any, compatibility: Compatibility
) -> None:
    prompt = encode(package)[-1]
    generator = _start(genai, model, [prompt], NEW_TOKENS)
    _finish(generator)
    generator.rewind_to(len(prompt) // 2)
    generator.append_tokens(prompt[len(prompt) // 2 :].astype(np.int32))
    compatibility.tell(CLIENT, "rewound and appended to", *_held(package, [prompt], [_finish(generator)]))


def test_its_tokenizer_reads_the_same_ids(package: Path, model: Any, genai: Any, compatibility: Compatibility) -> None:
    tokenizer = genai.Tokenizer(model)
    assert [tokenizer.encode(text).tolist() for text in PROMPTS] == [ids.tolist() for ids in encode(package)]
    compatibility.tell(CLIENT, "tokenizer", column_of(open_package(package).manifest))


def test_the_folder_stays_as_it_was(package: Path, genai: Any) -> None:
    before = file_digests(package)
    genai_ids(genai, genai.Model(str(package)), [np.array([1, 2, 3])])
    assert file_digests(package) == before


def genai_ids(genai: Any, model: Any, parts: Sequence[Int64Array], new_tokens: int = NEW_TOKENS) -> list[int]:
    """What is written greedily after a prompt that was given in these parts, one after the other."""
    return _finish(_start(genai, model, parts, new_tokens))


def _held(package: Path, prompts: list[Int64Array], written: list[list[int]]) -> tuple[str, str]:
    """Check what followed prompts in pieces; the table's column and cell for it."""
    manifest = open_package(package).manifest
    if manifest.precision == "int4":
        assert_ours_but_for_ties(package, prompts, written)
        return column_of(manifest), TIES
    assert written == our_greedy_ids(package, prompts)
    return column_of(manifest), SAME


def _start(genai: Any, model: Any, parts: Sequence[Int64Array], new_tokens: int) -> Any:
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=sum(map(len, parts)) + new_tokens)
    generator = genai.Generator(model, parameters)
    for part in parts:
        generator.append_tokens(part.astype(np.int32))
    return generator


def _finish(generator: Any) -> list[int]:
    ids: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        ids.append(int(generator.get_next_tokens()[0]))
    return ids
