"""Packages that several test files read, converted once a session. Whoever alters one works on a `copied` folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest

from export.convert import convert
from runtime.config import GPT2Config
from runtime.package import Precision
from runtime.tokenizer import byte_alphabet

from .tiny import tiny_config, tiny_weights, write_safetensors_checkpoint

DEMO_CHECKPOINT = Path(__file__).parent.parent / "models" / "demo"
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")  # how long an example takes is the machine's affair

BYTES_AND_END = 257
"""The smallest vocabulary that can spell everything: 256 bytes and <|endoftext|>, whose id is 256."""


@pytest.fixture(scope="session")
def demo_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint as an fp32 package: read only."""
    return converted(DEMO_CHECKPOINT, tmp_path_factory.mktemp("packages"), "fp32")


@pytest.fixture(scope="session")
def demo_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint as an int8 package: read only."""
    return converted(DEMO_CHECKPOINT, tmp_path_factory.mktemp("packages"), "int8")


@pytest.fixture(scope="session")
def demo_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint as an int4 package: read only."""
    return converted(DEMO_CHECKPOINT, tmp_path_factory.mktemp("packages"), "int4")


@pytest.fixture(scope="session")
def demo_int8_kv8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint in int8, its keys and values too: read only."""
    output = tmp_path_factory.mktemp("packages") / "demo-int8-kv8"
    return convert(DEMO_CHECKPOINT, output, precision="int8", kv_cache="int8").package


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights with a tokenizer of bytes: it babbles, and ends a text now and then."""
    return bytes_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", n_vocab=BYTES_AND_END)


@pytest.fixture(scope="session")
def tiny_fp32(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` as an fp32 package: read only."""
    return converted(tiny_checkpoint, tmp_path_factory.mktemp("packages"), "fp32")


@pytest.fixture(scope="session")
def tiny_int8(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` as an int8 package: read only."""
    return converted(tiny_checkpoint, tmp_path_factory.mktemp("packages"), "int8")


@pytest.fixture(scope="session")
def tiny_int4(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` as an int4 package: read only."""
    return converted(tiny_checkpoint, tmp_path_factory.mktemp("packages"), "int4")


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """Copy a package to a folder of the test's own."""
    return lambda package: Path(shutil.copytree(package, tmp_path / "package"))


def converted(checkpoint: Path, into: Path, precision: Precision) -> Path:
    return convert(checkpoint, into / f"{checkpoint.name}-{precision}", precision=precision, allow_loss=True).package


def bytes_checkpoint(folder: Path, *, n_vocab: int) -> Path:
    """A tiny checkpoint whose tokens are single bytes; rows of the embedding beyond `BYTES_AND_END` are padding."""
    config: GPT2Config = replace(tiny_config(), n_vocab=n_vocab, eos_token_id=BYTES_AND_END - 1)
    write_safetensors_checkpoint(folder, config, tiny_weights(config))
    by_byte = sorted(byte_alphabet(), key=byte_alphabet().__getitem__)
    vocabulary = {character: byte for byte, character in enumerate([*by_byte, "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return folder
