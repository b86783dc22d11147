from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.tensorbundle import read_index
from runtime.errors import CheckpointError
from tests import write_tensorbundle as bundle
from tests.memory import no_more_memory_than

ARRAYS = {
    f"model/h{layer}/{name}": np.arange(size, dtype=np.float32).reshape(1, 2, -1) + layer
    for layer in range(12)
    for name, size in {"attn/c_attn/w": 24, "ln_1/b": 4, "ln_1/g": 4}.items()
}
MUTATIONS = settings(max_examples=300, deadline=2000, derandomize=True, database=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundle")


def write_index(folder: Path, content: bytes, data_bytes: int = 64) -> Path:
    (folder / "model.ckpt.data-00000-of-00001").write_bytes(bytes(data_bytes))
    index = folder / "model.ckpt.index"
    index.write_bytes(content)
    return index


def refusal(index: Path) -> str:
    """The message with which the index, or the first tensor that cannot be read, is refused."""
    with pytest.raises(CheckpointError) as caught:
        for tensor in read_index(index).values():
            tensor.read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def one_entry(entry: bytes, header: bytes = bundle.HEADER) -> bytes:
    return bundle.table([(b"", header), (b"model/wte", entry)])


# --- facts and laws ----------------------------------------------------------------------------------------------


def test_index_of_openai_117m(tmp_path: Path) -> None:
    where = os.environ.get("GPT2_EDGE_OPENAI_117M")
    if not where:
        pytest.skip(
            "GPT2_EDGE_OPENAI_117M does not name the folder with model.ckpt.index and tensors.json of OpenAI's 117M"
        )
    expected = json.loads((Path(where) / "tensors.json").read_text())
    content = (Path(where) / "model.ckpt.index").read_bytes()
    index = write_index(tmp_path, content)
    os.truncate(index.with_name("model.ckpt.data-00000-of-00001"), 497_759_232)  # sparse: as long as the real one
    tensors = read_index(index)
    assert list(tensors) == sorted(expected)
    assert len(tensors) == 148
    assert sum(tensor.size for tensor in tensors.values()) == 497_759_232
    for name, tensor in tensors.items():
        assert tensor.fault is None
        assert {
            "shape": list(tensor.shape),
            "dtype": 1,
            "offset": tensor.offset,
            "size": tensor.size,
            "crc32c_masked": tensor.masked_crc32c,
        } == {"offset": 0} | expected[name]


@pytest.mark.parametrize("block_keys", [1, 5, 17, 1000])
def test_what_is_written_is_read(tmp_path: Path, block_keys: int) -> None:
    bundle.write_bundle(tmp_path / "model.ckpt", ARRAYS, block_keys)
    tensors = read_index(tmp_path / "model.ckpt.index")
    assert list(tensors) == sorted(ARRAYS)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.read(), ARRAYS[name])


def test_a_tensor_longer_than_one_piece_is_read(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 200_003), dtype=np.float32)
    bundle.write_bundle(tmp_path / "model.ckpt", {"model/wte": values})
    read = read_index(tmp_path / "model.ckpt.index")["model/wte"].read()
    np.testing.assert_array_equal(read, values)
    assert read.flags.c_contiguous
    assert read.dtype == np.float32


# --- refusals ----------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_data_names_its_tensor(tmp_path: Path) -> None:
    bundle.write_bundle(tmp_path / "model.ckpt", ARRAYS)
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    tensor = read_index(tmp_path / "model.ckpt.index")["model/h3/ln_1/g"]
    raw = bytearray(data.read_bytes())
    raw[tensor.offset + 5] ^= 1
    data.write_bytes(raw)
    with pytest.raises(
        CheckpointError, match=r"^model/h3/ln_1/g is damaged: checksum 0x.* recorded; copy model\.ckpt\.data"
    ):
        tensor.read()


def test_nan_and_inf_are_named_with_their_place(tmp_path: Path) -> None:
    values = np.zeros((2, 200_000), np.float32)
    values[1, 150_000] = np.nan
    bundle.write_bundle(tmp_path / "model.ckpt", {"model/wte": values})
    assert refusal(tmp_path / "model.ckpt.index") == "model/wte holds NaN or Inf, first at [1, 150000]"
    values[1, 150_000], values[0, 7] = 0, -np.inf
    bundle.write_bundle(tmp_path / "model.ckpt", {"model/wte": values})
    assert refusal(tmp_path / "model.ckpt.index") == "model/wte holds NaN or Inf, first at [0, 7]"


def test_a_truncated_data_file_is_refused(tmp_path: Path) -> None:
    bundle.write_bundle(tmp_path / "model.ckpt", {"model/wte": np.zeros((4, 4), np.float32)})
    os.truncate(tmp_path / "model.ckpt.data-00000-of-00001", 60)
    expected = "model/wte ends at byte 64 of model.ckpt.data-00000-of-00001, which has 60 bytes"
    assert refusal(tmp_path / "model.ckpt.index") == expected


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    bundle.write_bundle(tmp_path / "model.ckpt", ARRAYS)
    (tmp_path / "model.ckpt.data-00000-of-00001").unlink()
    assert "its data file model.ckpt.data-00000-of-00001 is missing" in refusal(tmp_path / "model.ckpt.index")


def test_an_index_cut_at_any_byte_is_refused(folder: Path) -> None:
    content = one_entry(bundle.entry((4, 4), 0, 64, 0))
    for length in range(len(content)):
        assert "is no readable TensorFlow index" in refusal(write_index(folder, content[:length]))


def test_any_flipped_bit_in_a_block_is_refused(folder: Path) -> None:
    content = one_entry(bundle.entry((4, 4), 0, 64, 0))
    for at in range(len(content) - 48):
        flipped = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
        assert "does not match its checksum" in refusal(write_index(folder, flipped))


WHOLE = bundle.entry((4, 4), 0, 64, 0)
SHAPE = bundle.nested(2, bundle.nested(2, bundle.number(1, 16)))
HOSTILE = {
    "magic": (one_entry(WHOLE)[:-1] + b"\0", "not the magic number"),
    "compressed": (bundle.table_of_blocks([(b"", bundle.block([]))], kind=1), r"compressed \(type 1\), which is not"),
    "big-endian": (one_entry(WHOLE, bundle.number(1, 1) + bundle.number(2, 1)), "big-endian"),
    "version": (one_entry(WHOLE, bundle.number(1, 1) + bundle.nested(3, bundle.number(2, 7))), "bundle version 7"),
    "no header": (bundle.table([(b"model/wte", WHOLE)]), "its header counts 0 data files"),
    "many shards": (one_entry(WHOLE, bundle.number(1, 10**12)), "counts 1000000000000 data files"),
    "shard": (one_entry(bundle.entry((16,), 0, 64, 0, shard=3)), "model/wte lies in shard 3 of 1"),
    "slices": (one_entry(WHOLE + bundle.nested(7, b"")), "model/wte is stored in slices"),
    "int64": (one_entry(bundle.entry((8,), 0, 64, 0, dtype=9)), "^model/wte has dtype DT_INT64, expected one of F32"),
    "other type": (one_entry(bundle.entry((8,), 0, 64, 0, dtype=77)), "^model/wte has dtype DataType 77"),
    "offset": (one_entry(bundle.entry((16,), 2**62, 64, 0)), "^model/wte ends at byte 4611686018427387968 of"),
    "size": (one_entry(bundle.entry((16,), 0, 60, 0)), r"^model/wte has 60 bytes, which is not F32 of shape \[16\]"),
    "huge": (one_entry(bundle.entry((2**40, 2**40), 0, 2**63, 0)), "^model/wte has 9223372036854775808 bytes"),
    "huge, consistent": (one_entry(bundle.entry((2**60,), 0, 2**62, 0)), "^model/wte ends at byte 4611686018427387904"),
    "negative": (one_entry(bundle.entry((2**64 - 1,), 0, 64, 0)), "^model/wte has 64 bytes, which is not F32 of shape"),
    "rank": (one_entry(bundle.entry((1,) * 9, 0, 64, 0)), "more than 8 dimensions"),
    "unknown rank": (one_entry(bundle.nested(2, bundle.number(3, 1))), "unknown rank"),
    "unknown field": (one_entry(WHOLE + bundle.number(9, 1)), "field 9 of wire type 0"),
    "wire type": (one_entry(bundle.nested(1, b"a")), "field 1 of wire type 2"),
    "field past end": (one_entry(b"\x12\x7f"), "field 2 of a message runs past its end"),
    "varint past end": (one_entry(b"\x08\xff"), "a number runs past the end"),
    "long varint": (one_entry(b"\x08" + b"\xff" * 20), "a number has more than ten bytes"),
    "order": (bundle.table([(b"", bundle.HEADER), (b"b", WHOLE), (b"a", WHOLE)]), "not in ascending order"),
    "same key": (bundle.table([(b"", bundle.HEADER), (b"b", WHOLE), (b"b", WHOLE)]), "not in ascending order"),
    "separator": (bundle.table_of_blocks([(b"a", bundle.block([(b"b", b"")]))]), "keys that its index does not cover"),
    "long key": (bundle.table([(b"a" * 257, b"")]), "entry at byte 0 of a block does not fit"),
    "name": (bundle.table([(b"", bundle.HEADER), (b"a\nb", WHOLE)]), r"tensor name 'a\\nb' is not printable"),
    "name, not text": (bundle.table([(b"", bundle.HEADER), (b"a\xff", WHOLE)]), "can't decode byte 0xff"),
    "no restarts": (bundle.table_of_blocks([(b"", bytes(4))]), "counts 0 restarts in 4 bytes"),
    "many restarts": (bundle.table_of_blocks([(b"", b"\xff" * 4)]), "counts 4294967295 restarts in 4 bytes"),
    "restart": (
        bundle.table_of_blocks([(b"", bundle.block([(b"", b"")])[:3] + b"\2\0\0\0\1\0\0\0")]),
        "restarts where no",
    ),
    "key from nowhere": (bundle.table_of_blocks([(b"", b"\5\0\0" + bytes(4) + b"\1\0\0\0")]), "does not fit"),
    "empty": (b"", "not the magic number"),
    "too long": (bytes((256 << 10) + 1), "has more than 262144 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_index_is_refused(folder: Path, name: str) -> None:
    content, expected = HOSTILE[name]
    assert re.search(expected, refusal(write_index(folder, content)))


def test_a_missing_index_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "model.ckpt.index").endswith("model.ckpt.index cannot be read: No such file or directory")


# --- mutations: parsed or refused, nothing else --------------------------------------------------------------------


def parse_or_refuse(index: Path) -> None:
    with no_more_memory_than(*index.parent.iterdir()):
        try:
            for tensor in read_index(index).values():
                tensor.read()
        except CheckpointError as error:
            assert "\n" not in str(error)


edits = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4)


def mutate(content: bytes, changes: list[tuple[int, int]], cut: int | None) -> bytes:
    mutable = bytearray(content)
    for at, value in changes:
        mutable[at % len(mutable)] = value
    return bytes(mutable[:cut])


@MUTATIONS
@given(changes=edits, cut=st.none() | st.integers(0, 400))
def test_mutated_files(folder: Path, changes: list[tuple[int, int]], cut: int | None) -> None:
    parse_or_refuse(write_index(folder, mutate(one_entry(WHOLE), changes, cut)))


@MUTATIONS
@given(changes=edits, cut=st.none() | st.integers(0, 100))
def test_mutated_blocks_under_a_right_checksum(folder: Path, changes: list[tuple[int, int]], cut: int | None) -> None:
    block = bundle.block([(b"", bundle.HEADER), (b"model/wpe", WHOLE), (b"model/wte", WHOLE)])
    parse_or_refuse(write_index(folder, bundle.table_of_blocks([(b"model/wte", mutate(block, changes, cut))])))


@MUTATIONS
@given(header=st.binary(max_size=12), entry=st.binary(max_size=40))
def test_arbitrary_messages(folder: Path, header: bytes, entry: bytes) -> None:
    parse_or_refuse(write_index(folder, one_entry(entry, header)))
    parse_or_refuse(write_index(folder, one_entry(entry)))
