from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.checkpoint import read_checkpoint
from export.llmc_file import HEADER_BYTES, MAGIC, read_llmc
from runtime.errors import CheckpointError
from tests.memory import no_more_memory_than
from tests.tiny import tiny_config, tiny_weights
from tests.write_layouts import write_llmc_checkpoint

CONFIG = tiny_config()
WEIGHTS = tiny_weights(CONFIG)
FIELDS = ("magic", "version", "n_ctx", "n_vocab", "n_layer", "n_head", "n_embd", "padded_vocab")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llmc_checkpoint(tmp_path_factory.mktemp("llmc"), CONFIG, WEIGHTS)


@pytest.fixture(scope="module")
def content(folder: Path) -> bytes:
    return (folder / "gpt2.bin").read_bytes()


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_llmc(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_fields(path: Path, content: bytes, **fields: int) -> Path:
    header = dict(zip(FIELDS, struct.unpack_from("<8i", content), strict=True)) | fields
    path.write_bytes(struct.pack("<8i", *header.values()) + content[32:])
    return path


# --- facts ---------------------------------------------------------------------------------------------------------


def test_float32_is_read_bit_for_bit(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    assert checkpoint.layout == "llm.c"
    assert checkpoint.config == CONFIG
    assert checkpoint.source_config["padded_vocab"] == 256
    for name, values in WEIGHTS.items():
        np.testing.assert_array_equal(checkpoint.tensors[name], values)
        assert checkpoint.tensors[name].flags.c_contiguous


def test_bfloat16_is_the_upper_half(tmp_path: Path) -> None:
    tensors = read_checkpoint(write_llmc_checkpoint(tmp_path, CONFIG, WEIGHTS, version=5)).tensors
    for name, values in WEIGHTS.items():
        np.testing.assert_array_equal(tensors[name], (values.view(np.uint32) & 0xFFFF0000).view(np.float32))


def test_the_file_itself_can_be_named(folder: Path) -> None:
    checkpoint = read_checkpoint(folder / "gpt2.bin")
    assert (checkpoint.folder, checkpoint.name) == (folder, "gpt2")


def test_two_files_in_a_folder_must_be_named(tmp_path: Path, content: bytes) -> None:
    for name in ("model_00010.bin", "model_00020.bin", "broken.bin"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "state.bin").write_bytes(struct.pack("<i", 20240527) + bytes(2000))
    (tmp_path / "broken.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2 checkpoints of llm.c \(model_00010.bin, model_00020.bin ...\): name"):
        read_checkpoint(tmp_path)
    assert read_checkpoint(tmp_path / "model_00020.bin").config == CONFIG


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"magic": 1}, f"begins with 1, expected llm.c's magic number {MAGIC}"),
        ({"version": 2}, "has version 2 and a padded vocabulary of 256, expected version 3 (float32) or 5"),
        ({"padded_vocab": 0}, "has version 3 and a padded vocabulary of 0, expected version 3 (float32) or 5"),
        ({"version": 5}, "its header asks for"),
        ({"n_layer": 2**31 - 1}, "its header asks for"),
        ({"n_embd": 2**31 - 1}, "its header asks for"),
        ({"n_layer": 0}, "a number below 1"),
        ({"n_embd": -32}, "a number below 1"),
        ({"n_vocab": 257}, "fewer rows than tokens"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, content: bytes, fields: dict[str, int], expected: str) -> None:
    assert expected in refusal(with_fields(tmp_path / "gpt2.bin", content, **fields))


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError, match="n_embd 32 is no multiple of n_head 3"):
        read_checkpoint(with_fields(tmp_path / "gpt2.bin", content, n_head=3))


def test_the_old_layout_of_bfloat16_is_refused(tmp_path: Path, content: bytes) -> None:
    """It had version 3 too, half as many bytes, and nothing where the padded vocabulary stands now."""
    half = content[: HEADER_BYTES + (len(content) - HEADER_BYTES) // 2]
    assert "export it again with a newer llm.c" in refusal(with_fields(tmp_path / "old.bin", half, padded_vocab=0))
    assert "its header asks for" in refusal(with_fields(tmp_path / "old.bin", half))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_length_is_refused(tmp_path: Path, content: bytes, change: int) -> None:
    (tmp_path / "gpt2.bin").write_bytes(content)
    os.truncate(tmp_path / "gpt2.bin", len(content) + change)
    assert f"has {len(content) + change} bytes, its header asks for {len(content)}" in refusal(tmp_path / "gpt2.bin")


def test_a_file_without_a_whole_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "gpt2.bin").write_bytes(content[:1023])
    assert "has 1023 bytes, a header of llm.c has 1024" in refusal(tmp_path / "gpt2.bin")


# --- mutations: parsed or refused, nothing else, and no memory for what is not there -------------------------------

numbers = st.integers(-(2**31), 2**31 - 1) | st.sampled_from([0, 1, 2, 3, 5, 32, 131, 256, 2**31 - 1])


@settings(max_examples=600, deadline=2000, derandomize=True, database=None)
@given(
    fields=st.dictionaries(st.sampled_from(FIELDS), numbers, max_size=4),
    changes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 255)), max_size=2),
    cut=st.none() | st.integers(0, 3000),
)
def test_mutated_files(
    tmp_path_factory: pytest.TempPathFactory,
    content: bytes,
    fields: dict[str, int],
    changes: list[tuple[int, int]],
    cut: int | None,
) -> None:
    path = with_fields(tmp_path_factory.getbasetemp() / "mutated.bin", content, **fields)
    mutated = bytearray(path.read_bytes())
    for at, value in changes:
        mutated[at] = value
    path.write_bytes(mutated[:cut])
    with no_more_memory_than(path):
        try:
            tensors = read_checkpoint(path).tensors
            for name in tensors:
                tensors[name]
        except CheckpointError as error:
            assert "\n" not in str(error)
