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

from export.safetensors_file import read_sharded_safetensors
from runtime.errors import CheckpointError
from tests.memory import no_more_memory_than


def refusal(path: Path) -> str:
    """The message with which the index, or the first tensor that cannot be read, is refused."""
    with pytest.raises(CheckpointError) as caught:
        for tensor in read_sharded_safetensors(path).values():
            tensor.read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_shards(folder: Path, weight_map: object, shards: dict[str, list[str]]) -> Path:
    for file_name, names in shards.items():
        save_file({name: np.ones(2, np.float32) for name in names}, folder / file_name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    weight_map = {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}
    index = write_shards(tmp_path, weight_map, {"1.safetensors": ["a", "c"], "2.safetensors": ["b"]})
    assert sorted(read_sharded_safetensors(index)) == ["a", "b", "c"]


SHARD_FAULTS: dict[str, tuple[Any, str]] = {
    "climbs": ({"a": "../1.safetensors"}, r"a lies in '\.\./1\.safetensors', expected a file beside the index"),
    "climbs, Windows": ({"a": "..\\1.safetensors"}, "expected a file beside the index"),
    "drive": ({"a": "C:1.safetensors"}, "expected a file beside the index"),
    "absolute": ({"a": "/1.safetensors"}, "expected a file beside the index"),
    "other file": ({"a": "config.json"}, "a lies in 'config.json', expected a .safetensors file"),
    "no file": ({"a": 1}, "a lies in 1, expected a .safetensors file"),
    "null byte": ({"a": "1\0.safetensors"}, r"expected a .safetensors file"),
    "no map": (None, "has no weight_map"),
    "empty map": ({}, "has no weight_map"),
    "name": ({"a\n": "1.safetensors"}, r"tensor name 'a\\n' is not printable"),
    "missing file": ({"a": "3.safetensors"}, "3.safetensors cannot be read: No such file"),
    "missing tensor": ({"a": "1.safetensors", "c": "1.safetensors"}, "c is not in 1.safetensors$"),
    "not in the index": ({"b": "2.safetensors"}, "a is in 2.safetensors, the index says nothing of it$"),
    "twice": ({"a": "1.safetensors", "b": "2.safetensors"}, "a is in 2.safetensors, the index says 1.safetensors$"),
}


@pytest.mark.parametrize("name", SHARD_FAULTS)
def test_faults_of_shards_are_named(tmp_path: Path, name: str) -> None:
    weight_map, expected = SHARD_FAULTS[name]
    index = write_shards(tmp_path, weight_map, {"1.safetensors": ["a"], "2.safetensors": ["a", "b"]})
    assert re.search(expected, refusal(index))


def test_all_damaged_shards_are_named_at_once(tmp_path: Path) -> None:
    weight_map = {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"}
    index = write_shards(tmp_path, weight_map, {"1.safetensors": ["a"], "3.safetensors": ["c"]})
    os.truncate(tmp_path / "3.safetensors", 60)
    assert re.search(r"2.safetensors cannot be read: .*; .*3.safetensors has 60 bytes", refusal(index))


# --- mutations: parsed or refused, nothing else --------------------------------------------------------------------

names = st.sampled_from(["a", "b", "1.safetensors", "2.safetensors", "../1.safetensors", "", "\n", "weight_map"])
anything = st.recursive(
    names | st.text(max_size=3) | st.integers() | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)


def parse_or_refuse(index: Path) -> None:
    with no_more_memory_than(*index.parent.iterdir()):
        try:
            for tensor in read_sharded_safetensors(index).values():
                tensor.read()
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = {"1.safetensors": ["a"], "2.safetensors": ["b"]}
    return write_shards(tmp_path_factory.mktemp("shards"), {"a": "1.safetensors", "b": "2.safetensors"}, shards)


@settings(max_examples=300, deadline=2000, derandomize=True, database=None)
@given(root=st.fixed_dictionaries({"weight_map": st.dictionaries(names, names, max_size=3) | anything}) | anything)
def test_arbitrary_indices(index: Path, root: object) -> None:
    index.write_text(json.dumps(root))
    parse_or_refuse(index)


@settings(max_examples=300, deadline=2000, derandomize=True, database=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 255)), max_size=4),
    cut=st.none() | st.integers(0, 100),
)
def test_mutated_indices(index: Path, changes: list[tuple[int, int]], cut: int | None) -> None:
    content = bytearray(b'{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    for at, value in changes:
        content[at % len(content)] = value
    index.write_bytes(content[:cut])
    parse_or_refuse(index)
