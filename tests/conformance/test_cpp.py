"""examples/cpp, built against the installed onnxruntime-genai and run: the same text as ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import SamplingOptions, TextGenerator
from runtime.package import open_package

from .compatibility import Compatibility, column_of
from .conftest import PROMPTS, version_of
from .programs import ClientError

CLIENT = f"onnxruntime-genai {version_of('onnxruntime-genai')}, C++"
NEW_TOKENS = 40

Generate = Callable[..., str]


def test_it_streams_our_text(package: Path, cpp_generate: Generate, compatibility: Compatibility) -> None:
    generator = TextGenerator.load(package)
    for prompt in PROMPTS[-4:]:
        ours = generator.generate(prompt, max_new_tokens=NEW_TOKENS, sampling=SamplingOptions.greedy())
        assert cpp_generate(package, prompt, "--greedy", "--new-tokens", NEW_TOKENS) == ours.text + "\n"
    compatibility.tell(CLIENT, "the program of examples/cpp, greedy", column_of(open_package(package).manifest))


def test_it_samples_as_the_package_says(demo_int8: Path, cpp_generate: Generate) -> None:
    texts = {cpp_generate(demo_int8, "Once upon a time", "--new-tokens", 30) for _ in range(3)}
    assert len(texts) > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "usage: generate PACKAGE PROMPT"),
        (("x", "--new-tokens", "0"), "--new-tokens: expected --greedy or --new-tokens N"),
        (("x", "--new-tokens", "600"), "cannot be greater than model context_length (512)"),
    ],
)
def test_what_it_cannot_do_it_refuses(
    demo_int8: Path, cpp_generate: Generate, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ClientError) as caught:
        cpp_generate(demo_int8, *words)
    assert message in str(caught.value)
    assert "status 2" in str(caught.value)
