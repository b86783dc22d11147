"""Writes OpenAI's checkpoint layout without sharing code with the reader, which it is there to test."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from runtime.config import GPT2Config

RESTART_INTERVAL = 16
MAGIC = bytes.fromhex("57fb808b247547db")
FLOAT32 = 1
HEADER = bytes.fromhex("08011a020801")  # BundleHeaderProto: one shard, little-endian, version 1


def write_openai_checkpoint(
    folder: Path,
    config: GPT2Config,
    weights: Mapping[str, np.ndarray[Any, np.dtype[Any]]],
    *,
    prefix: str = "model.ckpt",
    tokenizer_dir: Path | None = None,
) -> Path:
    """Write checkpoint, hparams.json, <prefix>.index and its data file.

    Args:
        folder: is made if it is not there.
        config: what hparams.json says.
        weights: canonical names; widened to float32.
        prefix: of the index and the data file.
        tokenizer_dir: a folder to copy vocab.json from, as encoder.json, and merges.txt, as vocab.bpe.
    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, values in weights.items():
        spelled = openai_name(name)
        shape = (1, *values.shape) if spelled.endswith("/w") else values.shape
        tensors[spelled] = values.astype("<f4").reshape(shape)
    write_bundle(folder / prefix, tensors)
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{prefix}"\nall_model_checkpoint_paths: "{prefix}"\n')
    hparams = {name: getattr(config, name) for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    if tokenizer_dir is not None:
        shutil.copy(tokenizer_dir / "vocab.json", folder / "encoder.json")
        shutil.copy(tokenizer_dir / "merges.txt", folder / "vocab.bpe")
    return folder


def openai_name(name: str) -> str:
    """h.0.ln_1.weight -> model/h0/ln_1/g"""
    parts = name.split(".")
    if parts[0] in ("wte", "wpe"):
        return f"model/{parts[0]}"
    letter = {"weight": "g" if parts[-2].startswith("ln") else "w", "bias": "b"}[parts[-1]]
    if parts[0] == "h":
        parts[:2] = ["h" + parts[1]]
    return "/".join(["model", *parts[:-1], letter])


def write_bundle(path: Path, tensors: Mapping[str, np.ndarray[Any, np.dtype[Any]]], block_keys: int = 1 << 30) -> None:
    """Write <path>.index and <path>.data-00000-of-00001, with at most `block_keys` keys in a block."""
    entries = [(b"", HEADER)]
    offset = 0
    with path.with_name(path.name + ".data-00000-of-00001").open("wb") as data:
        for name in sorted(tensors):
            raw = tensors[name].tobytes()
            data.write(raw)
            entries.append((name.encode(), entry(tensors[name].shape, offset, len(raw), masked(raw))))
            offset += len(raw)
    path.with_name(path.name + ".index").write_bytes(table(entries, block_keys))


def entry(shape: tuple[int, ...], offset: int, size: int, crc: int, *, dtype: int = FLOAT32, shard: int = 0) -> bytes:
    """A BundleEntryProto; as in every such message, zeros are left out."""
    dims = b"".join(nested(2, number(1, dim)) for dim in shape)
    numbers = number(3, shard) + number(4, offset) + number(5, size)
    return number(1, dtype) + nested(2, dims) + numbers + b"\x35" + struct.pack("<I", crc)


def table(entries: list[tuple[bytes, bytes]], block_keys: int = 1 << 30) -> bytes:
    """A sorted table of these entries."""
    parts = [entries[start : start + block_keys] for start in range(0, len(entries), block_keys)]
    return table_of_blocks([(part[-1][0], block(part)) for part in parts])


def table_of_blocks(blocks: list[tuple[bytes, bytes]], *, kind: int = 0) -> bytes:
    """A table of data blocks, each with its last key: sealed, then an empty metaindex, the index, the footer."""
    content, index = b"", []
    for last_key, data in blocks:
        index.append((last_key, varint(len(content)) + varint(len(data))))
        content += sealed(data, kind)
    metaindex, last = block([]), block(index)
    handles = varint(len(content)) + varint(len(metaindex))
    content += sealed(metaindex)
    handles += varint(len(content)) + varint(len(last))
    return content + sealed(last) + handles.ljust(40, b"\0") + MAGIC


def block(entries: list[tuple[bytes, bytes]]) -> bytes:
    content, restarts, previous = b"", [0], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % RESTART_INTERVAL:
            while shared < min(len(key), len(previous)) and key[shared] == previous[shared]:
                shared += 1
        elif i:
            restarts.append(len(content))
        content += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    return content + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def sealed(block: bytes, kind: int = 0) -> bytes:
    """With its type (0: not compressed) and the checksum of both."""
    block += bytes([kind])
    return block + struct.pack("<I", masked(block))


def masked(content: bytes) -> int:
    crc = google_crc32c.value(content)
    return int(((crc >> 15) | (crc << 17 & 0xFFFFFFFF)) + 0xA282EAD8 & 0xFFFFFFFF)


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value) if value else b""


def nested(field: int, message: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(message)) + message


def varint(value: int) -> bytes:
    low = value & 0x7F
    return bytes([low | 0x80]) + varint(value >> 7) if value >> 7 else bytes([low])
