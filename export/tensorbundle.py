"""OpenAI's TensorFlow checkpoints (tensor bundle, version 2), read without TensorFlow.

    <prefix>.index                  a LevelDB-style sorted table: data blocks, a metaindex block, an index block, and a
                                    48-byte footer with two block handles and a magic number
    <prefix>.data-00000-of-00001    the tensors, raw and little-endian

Key "" of the table holds a BundleHeaderProto, every other key is a tensor name with its BundleEntryProto.
Source: tensorflow/core/protobuf/tensor_bundle.proto; LevelDB's doc/table_format.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import google_crc32c

from runtime.errors import CheckpointError

from .checkpoint_files import RANK_LIMIT, StoredTensor, is_plain_name, mask_crc32c, read_small_file

INDEX_LIMIT_BYTES = 256 << 10  # the index of 1558M, the largest GPT-2, has about 20 KB
KEY_LIMIT_BYTES = 256
FOOTER_BYTES = 48
BLOCK_TRAILER_BYTES = 5  # one byte of type, four of checksum
MAGIC = 0xDB4775248B80FB57
BUNDLE_VERSION = 1

# Wire types of protocol buffers.
VARINT, BYTES, FIXED32 = 0, 2, 5

# Field number -> wire type. A field that is not here could change the meaning of the rest, so it is refused.
HEADER_FIELDS = {1: VARINT, 2: VARINT, 3: BYTES}  # num_shards, endianness, version
VERSION_FIELDS = {1: VARINT, 2: VARINT}  # producer, min_consumer
ENTRY_FIELDS = {1: VARINT, 2: BYTES, 3: VARINT, 4: VARINT, 5: VARINT, 6: FIXED32, 7: BYTES}
SHAPE_FIELDS = {2: BYTES, 3: VARINT}  # dim, unknown_rank
DIM_FIELDS = {1: VARINT, 2: BYTES}  # size, name

DTYPE_NAMES = {1: "F32", 2: "DT_DOUBLE", 3: "DT_INT32", 7: "DT_STRING", 9: "DT_INT64", 14: "DT_BFLOAT16", 19: "DT_HALF"}


def read_index(path: Path) -> dict[str, StoredTensor]:
    """Read and verify `<prefix>.index`; every tensor of it can then be read from the data files beside it.

    Args:
        path: the .index file.
    Returns:
        Tensors by name, sorted by name. One that is not float32 or lies outside of its file has a `fault`.
    Raises:
        CheckpointError: the index or a data file is missing, damaged, or uses a feature that GPT-2 checkpoints do not.
    """
    content = read_small_file(path, INDEX_LIMIT_BYTES)
    try:
        table = _read_table(content)
        num_shards = _read_header(table.pop(b"", b""))
        return {tensor.name: tensor for tensor in _read_entries(table, path, num_shards)}
    except ValueError as error:
        raise CheckpointError(f"{path} is no readable TensorFlow index: {error}; copy the checkpoint again") from error


def _read_entries(table: Mapping[bytes, bytes], index: Path, num_shards: int) -> Iterator[StoredTensor]:
    file_sizes: dict[Path, int] = {}
    for key, message in table.items():
        name = key.decode()
        if not is_plain_name(name):
            raise ValueError(f"tensor name {name!r} is not printable text")
        fields = _parse_message(message, ENTRY_FIELDS)
        if 7 in fields.messages:
            raise ValueError(f"{name} is stored in slices, which is not supported")
        shard = fields.number(3)
        if shard >= num_shards:
            raise ValueError(f"{name} lies in shard {shard} of {num_shards}")
        data = index.with_name(f"{index.stem}.data-{shard:05d}-of-{num_shards:05d}")
        if data not in file_sizes:
            file_sizes[data] = _file_size(data)
        code = fields.number(1)
        yield StoredTensor(
            name=name,
            dtype=DTYPE_NAMES.get(code, f"DataType {code}"),
            shape=_read_shape(fields.message(2)),
            path=data,
            offset=fields.number(4),
            size=fields.number(5),
            file_size=file_sizes[data],
            masked_crc32c=fields.number(6),
        )


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ValueError(f"its data file {path.name} is missing") from error


def _read_header(message: bytes) -> int:
    """The number of data files."""
    fields = _parse_message(message, HEADER_FIELDS)
    version = _parse_message(fields.message(3), VERSION_FIELDS)
    if fields.number(2) != 0:
        raise ValueError("its tensors are big-endian, which is not supported")
    if version.number(2) > BUNDLE_VERSION:
        raise ValueError(f"it needs a reader of bundle version {version.number(2)}, this one reads {BUNDLE_VERSION}")
    if not 0 < fields.number(1) < 100_000:  # five digits in the file name
        raise ValueError(f"its header counts {fields.number(1)} data files")
    return fields.number(1)


def _read_shape(message: bytes) -> tuple[int, ...]:
    fields = _parse_message(message, SHAPE_FIELDS)
    dims = fields.messages.get(2, [])
    if fields.number(3) or len(dims) > RANK_LIMIT:
        raise ValueError(f"a tensor has an unknown rank, or more than {RANK_LIMIT} dimensions")
    return tuple(_parse_message(dim, DIM_FIELDS).number(1) for dim in dims)


# --- the table ---------------------------------------------------------------------------------------------------


def _read_table(content: bytes) -> dict[bytes, bytes]:
    """All keys and values, sorted by key, every byte of them under a checksum that held."""
    footer = content[-FOOTER_BYTES:]
    if len(footer) < FOOTER_BYTES or int.from_bytes(footer[-8:], "little") != MAGIC:
        raise ValueError("its last 8 bytes are not the magic number of a table")
    metaindex, at = _read_handle(footer, 0)
    index, _ = _read_handle(footer, at)
    _read_block(content, metaindex)
    table: dict[bytes, bytes] = {}
    last_key: bytes | None = None
    for separator, handle in _read_block(content, index):
        for key, value in _read_block(content, _read_handle(handle, 0)[0]):
            if last_key is not None and key <= last_key:
                raise ValueError("its keys are not in ascending order")
            table[key] = value
            last_key = key
        if last_key is not None and last_key > separator:
            raise ValueError("a block holds keys that its index does not cover")
    return table


def _read_handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """((offset, size) of a block, where the next thing starts)."""
    offset, at = _read_varint(data, at)
    size, at = _read_varint(data, at)
    return (offset, size), at


def _read_block(content: bytes, handle: tuple[int, int]) -> list[tuple[bytes, bytes]]:
    """Keys and values of one block: entries, then restart offsets and their count, then type and checksum."""
    offset, size = handle
    end = offset + size
    if size < 4 or end + BLOCK_TRAILER_BYTES > len(content) - FOOTER_BYTES:
        raise ValueError(f"a block lies at bytes {offset} to {end} of {len(content)}")
    block, kind = content[offset:end], content[end]
    recorded = int.from_bytes(content[end + 1 : end + BLOCK_TRAILER_BYTES], "little")
    if mask_crc32c(google_crc32c.value(content[offset : end + 1])) != recorded:
        raise ValueError(f"the block at byte {offset} does not match its checksum")
    if kind != 0:
        raise ValueError(f"the block at byte {offset} is compressed (type {kind}), which is not supported")
    count = int.from_bytes(block[-4:], "little")
    entries_end = size - 4 - 4 * count
    if count == 0 or entries_end < 0:
        raise ValueError(f"the block at byte {offset} counts {count} restarts in {size} bytes")
    restarts = [int.from_bytes(block[at : at + 4], "little") for at in range(entries_end, size - 4, 4)]
    entries, full_keys = _read_block_entries(block[:entries_end])
    # A restart is a place where a search may begin, so a whole key must stand there.
    if restarts[0] != 0 or restarts != sorted(set(restarts)) or not full_keys.issuperset(restarts):
        raise ValueError(f"the block at byte {offset} has restarts where no key starts")
    return entries


def _read_block_entries(data: bytes) -> tuple[list[tuple[bytes, bytes]], set[int]]:
    """Keys and values, and the offsets at which a key is not an abbreviation of the one before it."""
    entries: list[tuple[bytes, bytes]] = []
    full_keys = {0}
    key, at = b"", 0
    while at < len(data):
        start = at
        shared, at = _read_varint(data, at)
        unshared, at = _read_varint(data, at)
        value_size, at = _read_varint(data, at)
        if shared > len(key) or shared + unshared > KEY_LIMIT_BYTES or at + unshared + value_size > len(data):
            raise ValueError(f"the entry at byte {start} of a block does not fit")
        if shared == 0:
            full_keys.add(start)
        key = key[:shared] + data[at : at + unshared]
        at += unshared + value_size
        entries.append((key, data[at - value_size : at]))
    return entries, full_keys


# --- protocol buffers --------------------------------------------------------------------------------------------


class _Message:
    """The fields of one message: numbers by field, and messages (or bytes) by field."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.messages: dict[int, list[bytes]] = {}

    def number(self, field: int) -> int:
        return self.numbers.get(field, 0)

    def message(self, field: int) -> bytes:
        return b"".join(self.messages.get(field, []))  # parts of a message that comes twice are merged


def _parse_message(data: bytes, wire_types: Mapping[int, int]) -> _Message:
    message = _Message()
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        field, wire_type = tag >> 3, tag & 7
        if wire_types.get(field) != wire_type:
            raise ValueError(f"a message has a field {field} of wire type {wire_type}, which is unknown")
        if wire_type == VARINT:
            message.numbers[field], at = _read_varint(data, at)
            continue
        size = 4
        if wire_type == BYTES:
            size, at = _read_varint(data, at)
        if at + size > len(data):
            raise ValueError(f"field {field} of a message runs past its end")
        part = data[at : at + size]
        at += size
        if wire_type == BYTES:
            message.messages.setdefault(field, []).append(part)
        else:
            message.numbers[field] = int.from_bytes(part, "little")
    return message


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(value below 2^64, where the next thing starts): seven bits a byte, the lowest first."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise ValueError("a number runs past the end of what holds it")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise ValueError("a number has more than ten bytes")
