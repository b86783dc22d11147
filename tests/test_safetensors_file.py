from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from export.safetensors_file import read_safetensors
from runtime.errors import CheckpointError
from tests.memory import no_more_memory_than

MUTATIONS = settings(max_examples=300, deadline=2000, derandomize=True, database=None)
TENSOR = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors")


def write_raw(path: Path, header: object, data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refusal(path: Path) -> str:
    """The message with which the file, or the first tensor that cannot be read, is refused."""
    with pytest.raises(CheckpointError) as caught:
        for tensor in read_safetensors(path).values():
            tensor.read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- facts and laws ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_safetensors_writes_is_read(tmp_path: Path, dtype: type) -> None:
    rng = np.random.default_rng(0)
    arrays = {"a": rng.standard_normal((3, 5)), "b": rng.standard_normal((2, 3, 100_000)), "c": np.zeros((0, 4))}
    arrays = {name: values.astype(dtype) for name, values in arrays.items()}
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tensors = read_safetensors(tmp_path / "model.safetensors")
    assert set(tensors) == set(arrays)
    for name, values in arrays.items():
        read = tensors[name].read()
        assert read.dtype == np.float32
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read, values.astype(np.float32))


def test_bfloat16_is_the_upper_half_of_float32(tmp_path: Path) -> None:
    values = np.array([[1, -2.5], [3.3895314e38, 1e-40]], np.float32)
    upper = (values.view(np.uint32) >> 16).astype("<u2")
    path = write_raw(
        tmp_path / "m.safetensors", {"a": TENSOR | {"dtype": "BF16", "data_offsets": [0, 8]}}, upper.tobytes()
    )
    expected = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal(read_safetensors(path)["a"].read(), expected)


def test_a_buffer_of_another_type_does_not_keep_the_rest_from_being_read(tmp_path: Path) -> None:
    arrays = {"a": np.ones(3, np.float32), "mask": np.ones((2, 2), bool)}
    save_file(arrays, tmp_path / "model.safetensors")
    tensors = read_safetensors(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(tensors["a"].read(), arrays["a"])
    assert tensors["mask"].fault == "mask has dtype BOOL, expected one of F32, F16, BF16, F64"


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "value"), [("<f2", np.inf), ("<f4", np.nan), ("<f8", 1e39)])
def test_values_that_are_not_finite_in_float32_are_refused(tmp_path: Path, dtype: str, value: float) -> None:
    values = np.zeros((3, 2), dtype)
    values[2, 1] = value
    save_file({"a": values}, tmp_path / "model.safetensors")
    assert refusal(tmp_path / "model.safetensors") == "a holds NaN or Inf, first at [2, 1]"


HOSTILE = {
    "empty object": ({}, "has 26 bytes, its tensors end at 10"),
    "list": ([], "is not a JSON object"),
    "not JSON": (b"{", "is not valid JSON: Expecting property name"),
    "not UTF-8": (b'{"\xff": 1}', "is not valid JSON: 'utf-8' codec"),
    "deep": (b"[" * 100_000, "is not valid JSON"),
    "key twice": (b'{"a": 1, "a": 2}', "it names a key twice"),
    "entry": ({"a": 3}, "a is not described by exactly a dtype, a shape and two data_offsets"),
    "further key": ({"a": TENSOR | {"b": 1}}, "a is not described by exactly"),
    "three offsets": ({"a": TENSOR | {"data_offsets": [0, 1, 2]}}, "a is not described by exactly"),
    "negative offset": ({"a": TENSOR | {"data_offsets": [-1, 16]}}, "a has no valid shape or offsets"),
    "offsets reversed": ({"a": TENSOR | {"data_offsets": [16, 0]}}, "a has no valid shape or offsets"),
    "fraction": ({"a": TENSOR | {"shape": [2.0, 2]}}, "a has no valid shape or offsets"),
    "truth": ({"a": TENSOR | {"shape": [True, 4]}}, "a has no valid shape or offsets"),
    "rank": ({"a": TENSOR | {"shape": [1] * 9}}, "a has no valid shape or offsets"),
    "huge": ({"a": TENSOR | {"shape": [10**30]}}, "a has no valid shape or offsets"),
    "huge product": ({"a": TENSOR | {"shape": [2**62, 2**62]}}, "^a has 16 bytes, which is not F32 of shape"),
    "wrong size": ({"a": TENSOR | {"shape": [2, 3]}}, r"^a has 16 bytes, which is not F32 of shape \[2, 3\]"),
    "out of file": ({"a": TENSOR | {"data_offsets": [0, 17]}}, "its tensors end at"),
    "far out of file": ({"a": TENSOR | {"data_offsets": [2**62, 2**62 + 16]}}, "an overlap or a hole"),
    "hole": ({"a": TENSOR | {"shape": [3], "data_offsets": [4, 16]}}, "an overlap or a hole"),
    "overlap": ({"a": TENSOR, "b": TENSOR}, "^.*b begins at byte .*: an overlap or a hole"),
    "name": ({"a\nb": TENSOR}, r"tensor name 'a\\nb' is not printable text"),
    "long name": ({"a" * 300: TENSOR}, "is not printable text"),
    "dtype": ({"a": TENSOR | {"dtype": "F\n"}}, "the dtype of a is not printable text"),
    "unknown dtype": ({"a": TENSOR | {"dtype": "F8_E4M3"}}, "^a has dtype F8_E4M3, expected one of F32"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_is_refused(folder: Path, name: str) -> None:
    header, expected = HOSTILE[name]
    assert re.search(expected, refusal(write_raw(folder / "model.safetensors", header)))


def test_a_file_cut_at_any_byte_is_refused(folder: Path) -> None:
    path = write_raw(folder / "model.safetensors", {"a": TENSOR})
    for length in range(path.stat().st_size - 1, -1, -1):
        os.truncate(path, length)
        message = refusal(path)
        assert f"has {length} bytes, its " in message


def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + b"{}")
    assert f"has 10 bytes, its first eight ask for a header of {2**64 - 1}" in refusal(path)


# --- mutations: parsed or refused, nothing else --------------------------------------------------------------------


def parse_or_refuse(path: Path) -> None:
    with no_more_memory_than(path):
        try:
            for tensor in read_safetensors(path).values():
                tensor.read()
        except CheckpointError as error:
            assert "\n" not in str(error)


@MUTATIONS
@given(
    changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    cut=st.none() | st.integers(0, 200),
)
def test_mutated_files(folder: Path, changes: list[tuple[int, int]], cut: int | None) -> None:
    path = write_raw(folder / "model.safetensors", {"a": TENSOR, "b": TENSOR | {"data_offsets": [16, 32]}}, bytes(32))
    content = bytearray(path.read_bytes())
    for at, value in changes:
        content[at % len(content)] = value
    path.write_bytes(content[:cut])
    parse_or_refuse(path)


numbers = st.sampled_from([-1, 0, 1, 2, 4, 16, 17, 2**40, 2**63, 10**40, 1.5, True, None])
anything = st.recursive(numbers | st.text(max_size=3), lambda inner: st.lists(inner, max_size=4), max_leaves=6)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "", "\n"]) | anything,
        "shape": st.lists(numbers, max_size=4) | anything,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | anything,
    },
    optional={"further": anything},
)


@MUTATIONS
@given(
    header=st.dictionaries(st.text(max_size=4), entries | anything, max_size=3), size=st.sampled_from([0, 4, 16, 32])
)
def test_arbitrary_headers(folder: Path, header: dict[str, Any], size: int) -> None:
    parse_or_refuse(write_raw(folder / "model.safetensors", header, bytes(size)))
