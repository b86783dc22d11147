"""The folder as it is, in onnxruntime-genai: one shared cache buffer, appended to and rewound.

Its runs have the shapes of ours, so the ids are equal in int8 too: prompts in pieces of two tokens or more, then one
token at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .conftest import NEW_TOKENS, PROMPTS, encode, file_digests, our_greedy_ids

Int64Array = NDArray[np.int64]


def test_a_prompt_is_continued_as_we_do(package: Path, genai: Any) -> None:
    model = genai.Model(str(package))
    prompts = encode(package)
    written = [_finish(_start(genai, model, prompt)) for prompt in prompts]
    assert written == our_greedy_ids(package, prompts)


def test_an_int4_package_is_continued_as_we_do(demo_int4: Path, genai: Any) -> None:
    """In one run only: 4-bit products of another number of rows are summed in another order."""
    test_a_prompt_is_continued_as_we_do(demo_int4, genai)


def test_a_prompt_in_two_parts_is_continued_as_we_do(package: Path, genai: Any) -> None:
    model = genai.Model(str(package))
    prompts = [prompt for prompt in encode(package) if len(prompt) >= 4]
    written = [_finish(_start(genai, model, prompt[:-2], prompt[-2:])) for prompt in prompts]
    assert written == our_greedy_ids(package, prompts)


def test_a_rewound_prompt_is_continued_as_we_do(package: Path, genai: Any) -> None:
    prompt = encode(package)[-1]
    generator = _start(genai, genai.Model(str(package)), prompt)
    _finish(generator)
    generator.rewind_to(len(prompt) // 2)
    generator.append_tokens(prompt[len(prompt) // 2 :].astype(np.int32))
    assert [_finish(generator)] == our_greedy_ids(package, [prompt])


def test_its_tokenizer_reads_the_same_ids(package: Path, genai: Any) -> None:
    tokenizer = genai.Tokenizer(genai.Model(str(package)))
    assert [tokenizer.encode(text).tolist() for text in PROMPTS] == [ids.tolist() for ids in encode(package)]


def test_the_folder_stays_as_it_was(package: Path, genai: Any) -> None:
    before = file_digests(package)
    _finish(_start(genai, genai.Model(str(package)), np.array([1, 2, 3])))
    assert file_digests(package) == before


def _start(genai: Any, model: Any, *parts: Int64Array) -> Any:
    """A greedy generator that was given the parts of a prompt one after the other."""
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=sum(map(len, parts)) + NEW_TOKENS)
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
