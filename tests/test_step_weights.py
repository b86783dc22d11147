"""What a decode step must read of the weights: the tables that rows are picked from are left out, all else counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from export.graph import build_graph
from export.onnx_builder import WeightsFile
from export.step_weights import decode_weight_bytes
from quantization.recipes import table_block_size
from runtime.config import GPT2Config
from runtime.package import Precision, read_manifest

from .tiny import tiny_config, tiny_weights

BYTES_OF_CONSTANTS = 400
"""The graph's own small constants: the most that may be counted beside the model's parameters."""


def graph_of(folder: Path, config: GPT2Config, precision: Precision) -> onnx.ModelProto:
    with (folder / "model.onnx_data").open("wb") as file:
        return build_graph(config, tiny_weights(config), precision, WeightsFile(file, "model.onnx_data"))


@pytest.mark.parametrize("tied", [True, False])
def test_fp32_reads_every_parameter_once_but_the_tables_of_rows(tmp_path: Path, tied: bool) -> None:
    config = replace(tiny_config(), tie_word_embeddings=tied)
    tables = config.n_ctx * config.n_embd + (0 if tied else config.n_vocab * config.n_embd)
    expected = 4 * (config.parameter_count - tables)
    assert 0 <= decode_weight_bytes(graph_of(tmp_path, config, "fp32")) - expected < BYTES_OF_CONSTANTS


@pytest.mark.parametrize("tied", [True, False])
def test_int8_reads_a_byte_a_weight_and_the_scales(tmp_path: Path, tied: bool) -> None:
    config = replace(tiny_config(), tie_word_embeddings=tied)
    width, inner, layers = config.n_embd, config.n_inner, config.n_layer
    matrices = 4 * width * width + 2 * width * inner
    columns = 3 * width + width + inner + width
    biases, norms = columns, 4 * width
    block = table_block_size(width, "int8")
    head = config.n_vocab * width * (1 + 4 / block)
    expected = layers * (matrices + 4 * (columns + biases + norms)) + 4 * 2 * width + head
    assert 0 <= decode_weight_bytes(graph_of(tmp_path, config, "int8")) - expected < BYTES_OF_CONSTANTS


def test_the_manifest_says_it(demo_int8: Path) -> None:
    model = onnx.load(demo_int8 / "onnx" / "model_quantized.onnx", load_external_data=False)
    assert read_manifest(demo_int8).decode_weight_bytes == decode_weight_bytes(model)
