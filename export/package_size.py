"""How large a package for the CPU would be, told from the model's numbers alone.

The weights file is exact: this repeats how `export.products` stores a matrix, and how `export.onnx_builder` lays out
the arrays. The graph beside it is small, and estimated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

from quantization.recipes import Quantized, matrix_group, table_block_size
from runtime.config import GPT2Config

from .checkpoint import EMBEDDING, HEAD, canonical_shapes
from .onnx_builder import ALIGNMENT, INLINE_BYTES

CpuPrecision: TypeAlias = Literal["fp32", "int8", "int4"]

GRAPH_BYTES: Mapping[CpuPrecision, tuple[int, int]] = {
    "fp32": (2_600, 3_300),
    "int8": (3_600, 6_900),
    "int4": (4_100, 4_200),
}
"""Of a graph without its inline arrays: of the model, and of each layer. Measured with 1 to 48 layers."""

BITS: Mapping[Quantized, int] = {"int8": 8, "int4": 4}

SMALL_FILES_BYTES = 3_500
"""The model card, the licence and the files of other clients."""

PROCESS_BYTES, LOADED_SHARE, VERIFICATION_BYTES_PER_ID = 110_000_000, 1.1, 10_800
"""Fitted to the peaks of real conversions: the libraries; the package as onnxruntime holds it; the prompts' logits in
every way of running them. Within 10% for demo (int8 195 MB, fp32 220 MB), 124M (778 MB, 1.25 GB), 774M (1.47 GB,
3.96 GB) and 1558M (int8 2.27 GB).
"""


def package_bytes(config: GPT2Config, precision: CpuPrecision, *, tokenizer_bytes: int) -> int:
    """All files but the manifest, within 1% for any model of use; `tokenizer_bytes` is what tokenizer.json takes."""
    whole, layer = GRAPH_BYTES[precision]
    inline = sum(size for size in _array_sizes(config, precision) if size <= INLINE_BYTES)
    graph = whole + layer * config.n_layer + inline
    return weights_bytes(config, precision) + graph + tokenizer_bytes + SMALL_FILES_BYTES


def weights_bytes(config: GPT2Config, precision: CpuPrecision) -> int:
    """The external data file, to the byte."""
    end = 0
    for size in _array_sizes(config, precision):
        if size > INLINE_BYTES:
            end += -end % ALIGNMENT + size
    return end


def _array_sizes(config: GPT2Config, precision: CpuPrecision) -> list[int]:
    """Bytes of every array that is stored, in the order of the graph."""
    sizes = [size for name, shape in canonical_shapes(config).items() for size in _stored_sizes(name, shape, precision)]
    return sizes if precision == "fp32" else [*sizes, 4 * config.n_embd]  # the column scale of the head's table


def _stored_sizes(name: str, shape: tuple[int, ...], precision: CpuPrecision) -> tuple[int, ...]:
    """Bytes of the arrays that one tensor becomes: its values, and their scales if it is quantized."""
    if precision == "fp32" or len(shape) == 1 or name == "wpe.weight":
        return (4 * math.prod(shape),)
    rows, columns = shape
    if name in (EMBEDDING, HEAD):
        return _block_sizes(rows, columns, table_block_size(columns, precision), precision)
    if precision == "int4":
        return _block_sizes(columns, rows, matrix_group(rows, precision), precision)
    return rows * columns, 4 * columns


def _block_sizes(rows: int, columns: int, block: int, precision: Quantized) -> tuple[int, int]:
    """Bytes of the codes and of the scales of a [rows, columns] matrix in blocks along its rows."""
    blocks = rows * -(-columns // block)
    return blocks * block * BITS[precision] // 8, 4 * blocks


def conversion_peak_bytes(config: GPT2Config, size: int) -> int:
    """About how much memory it takes to make a package of `size` bytes, at the peak: while it is verified."""
    return round(PROCESS_BYTES + LOADED_SHARE * size + VERIFICATION_BYTES_PER_ID * config.n_vocab)
