"""llm.c's checkpoints, read tensor by tensor with seek and read.

A file MUST be: 256 int32 (little-endian), of which the first eight are magic, version, longest context, vocabulary,
layers, heads, width and padded vocabulary; then the tensors of LAYOUT in its order, each for all layers at once, in
float32 (version 3) or bfloat16 (version 5). Linear layers are [out, in]. Nothing else.
An older layout used version 3 for bfloat16 and had no padded vocabulary, 0 in its place: it is refused.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import CheckpointError

from .checkpoint_files import READABLE_DTYPES, StoredTensor

MAGIC = 20240326
HEADER_BYTES = 256 * 4
DTYPES = {3: "F32", 5: "BF16"}  # version -> type of every tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmcHeader:
    """The numbers of the header, named as in OpenAI's hparams; the first `n_vocab` of `padded_vocab` rows count."""

    version: int
    n_ctx: int
    n_vocab: int
    n_layer: int
    n_head: int
    n_embd: int
    padded_vocab: int


def is_llmc(path: Path) -> bool:
    """Whether a file begins as llm.c's checkpoints do."""
    try:
        with path.open("rb") as file:
            return file.read(4) == struct.pack("<i", MAGIC)
    except OSError:
        return False


def read_llmc(path: Path) -> tuple[LlmcHeader, dict[str, StoredTensor]]:
    """Read and verify the header.

    Args:
        path: the file.
    Returns:
        The header, and the tensors in the order of the file by their canonical names. Matrices of the blocks are
        [out, in], and wte.weight has no padded rows.
    Raises:
        CheckpointError: the file cannot be read, is of an older layout, or has not the bytes that its header asks for.
    """
    header, file_size = _read_header(path)
    dtype = DTYPES[header.version]
    expected = HEADER_BYTES + READABLE_DTYPES[dtype] * _count_values(header)
    if file_size != expected:  # before names are made up for as many layers as the header says
        raise CheckpointError(
            f"{path} has {file_size} bytes, its header asks for {expected} ({header.n_layer} layers, {header.n_embd} "
            f"wide, {dtype}); copy it again"
        )
    tensors, at = {}, HEADER_BYTES
    for module, shape, layered in _layout(header):
        size = READABLE_DTYPES[dtype] * math.prod(shape)
        for layer in range(header.n_layer if layered else 1):
            name = f"h.{layer}.{module}" if layered else module
            tensors[name] = StoredTensor(
                name=name, dtype=dtype, shape=shape, path=path, offset=at, size=size, file_size=file_size
            )
            at += size
    tensors["wte.weight"] = tensors["wte.weight"].rows(header.n_vocab)
    return header, tensors


def _layout(header: LlmcHeader) -> list[tuple[str, tuple[int, ...], bool]]:
    """(canonical name, stored shape, whether every layer has one) in the order of the file."""
    embd = header.n_embd
    return [
        ("wte.weight", (header.padded_vocab, embd), False),
        ("wpe.weight", (header.n_ctx, embd), False),
        ("ln_1.weight", (embd,), True),
        ("ln_1.bias", (embd,), True),
        ("attn.c_attn.weight", (3 * embd, embd), True),
        ("attn.c_attn.bias", (3 * embd,), True),
        ("attn.c_proj.weight", (embd, embd), True),
        ("attn.c_proj.bias", (embd,), True),
        ("ln_2.weight", (embd,), True),
        ("ln_2.bias", (embd,), True),
        ("mlp.c_fc.weight", (4 * embd, embd), True),
        ("mlp.c_fc.bias", (4 * embd,), True),
        ("mlp.c_proj.weight", (embd, 4 * embd), True),
        ("mlp.c_proj.bias", (embd,), True),
        ("ln_f.weight", (embd,), False),
        ("ln_f.bias", (embd,), False),
    ]


def _count_values(header: LlmcHeader) -> int:
    return sum(math.prod(shape) * (header.n_layer if layered else 1) for _, shape, layered in _layout(header))


def _read_header(path: Path) -> tuple[LlmcHeader, int]:
    """(the header, bytes of the file)."""
    try:
        file_size = path.stat().st_size
        with path.open("rb") as file:
            content = file.read(HEADER_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) < HEADER_BYTES:
        raise CheckpointError(f"{path} has {file_size} bytes, a header of llm.c has {HEADER_BYTES}; copy it again")
    magic, version, n_ctx, n_vocab, n_layer, n_head, n_embd, padded_vocab = struct.unpack_from("<8i", content)
    if magic != MAGIC:
        raise CheckpointError(f"{path} begins with {magic}, expected llm.c's magic number {MAGIC}")
    if version not in DTYPES or padded_vocab == 0:
        raise CheckpointError(
            f"{path} has version {version} and a padded vocabulary of {padded_vocab}, expected version 3 (float32) or "
            "5 (bfloat16) with one above 0: export it again with a newer llm.c"
        )
    header = LlmcHeader(
        version=version,
        n_ctx=n_ctx,
        n_vocab=n_vocab,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        padded_vocab=padded_vocab,
    )
    if min(n_ctx, n_vocab, n_layer, n_head, n_embd) < 1 or padded_vocab < n_vocab:
        raise CheckpointError(f"{path}: {header} has a number below 1, or fewer rows than tokens; copy it again")
    return header, file_size
