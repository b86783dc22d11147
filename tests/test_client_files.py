"""The small files that other clients read: every value is the model's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from export.client_files import write_client_files, write_license, write_model_card
from runtime.config import OFFICIAL_SIZES
from runtime.package import MODEL_FILES, FileEntry, Manifest, Needs, Precision, Source, read_manifest
from tests.tiny import hugging_face_config, tiny_config

CONFIG = replace(tiny_config(), n_inner=100, tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True)


def written(folder: Path, name: str, precision: Precision = "int8") -> dict[str, Any]:
    write_client_files(folder, CONFIG, precision)
    values: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return values


def test_config_says_what_transformers_would(tmp_path: Path) -> None:
    values = written(tmp_path, "config.json")
    expected = hugging_face_config(CONFIG)
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("precision", "dtype", "file"),
    [
        ("fp32", "fp32", "model.onnx"),
        ("int8", "q8", "model_quantized.onnx"),
        ("int4", "q4", "model_q4.onnx"),
    ],
)
def test_transformers_js_finds_the_file_of_its_dtype(
    tmp_path: Path, precision: Precision, dtype: str, file: str
) -> None:
    section = written(tmp_path, "config.json", precision)["transformers.js_config"]
    assert section == {"dtype": dtype, "use_external_data_format": {file: 1}}
    assert MODEL_FILES[precision] == f"onnx/{file}"


def test_generation_is_sampled_as_openai_did(tmp_path: Path) -> None:
    assert written(tmp_path, "generation_config.json") == {
        "bos_token_id": 130,
        "eos_token_id": 130,
        "pad_token_id": 130,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 40,
    }


def test_genai_is_told_the_shape(tmp_path: Path) -> None:
    values = written(tmp_path, "genai_config.json")
    model, decoder = values["model"], values["model"]["decoder"]
    assert model["type"] == "decoder"
    assert (model["context_length"], model["vocab_size"]) == (64, 131)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (130, 130, 130)
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    assert [decoder[name] for name in sizes] == [16, 32, 2, 2, 2]
    assert decoder["filename"] == "onnx/model_quantized.onnx"
    assert values["search"]["past_present_share_buffer"] is True


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_genai_is_told_the_names_that_the_graph_has(request: pytest.FixtureRequest, precision: Precision) -> None:
    package: Path = request.getfixturevalue(f"tiny_{precision}")
    decoder = json.loads((package / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    graph = onnx.load(package / decoder["filename"], load_external_data=False).graph

    def names(spelled: dict[str, str]) -> set[str]:
        return {name % layer if "%d" in name else name for name in spelled.values() for layer in range(2)}

    assert names(decoder["inputs"]) | {"num_logits_to_keep"} == {value.name for value in graph.input}
    assert names(decoder["outputs"]) == {value.name for value in graph.output}


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "COPYING"])
def test_the_licence_comes_along(tmp_path: Path, name: str) -> None:
    checkpoint, package = tmp_path / "checkpoint", tmp_path / "package"
    for folder in (checkpoint, package):
        folder.mkdir()
    (checkpoint / name).write_bytes(b"Do as you like. \xe9\n")
    (checkpoint / name).chmod(0o400)
    write_license(package, checkpoint)
    assert (package / "LICENSE").read_bytes() == b"Do as you like. \xe9\n"
    assert (package / "LICENSE").stat().st_mode & 0o200


def test_a_missing_licence_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    write_license(tmp_path, tmp_path / "checkpoint")
    assert "came without a licence file" in (tmp_path / "LICENSE").read_text(encoding="utf-8")


def card_of(folder: Path, name: str, processor: tuple[str, ...] = (), *, narrows: bool = False) -> str:
    manifest = Manifest(
        config=OFFICIAL_SIZES["124M"],
        precision="int8",
        device="cpu",
        attention="GroupQueryAttention",
        kv_cache="float32",
        opset=21,
        decode_weight_bytes=123_456_789,
        needs=Needs(onnxruntime="1.2.3", processor=processor, narrows=narrows),
        source=Source(name=name, layout="safetensors", fingerprint="f00d"),
        recipe={"weights": "weights int8", "calibration": "calibrated on 3 tokens"},
        tools={"gpt2-edge": "9.9"},
        files={
            "onnx/model_quantized.onnx": FileEntry(500_000, ""),
            "onnx/model_quantized.onnx_data": FileEntry(125_000_000, ""),
            "tokenizer.json": FileEntry(10**9, ""),
        },
        quality={"tokens": 148, "kl": 0.00123, "top1": 0.987, "largest_difference": 0.5, "greedy_agreement": 1.0},
    )
    write_model_card(folder, manifest)
    return (folder / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_the_card_tells_what_the_manifest_says(tmp_path: Path) -> None:
    card = card_of(tmp_path, "124M", ("avx_vnni", "asimddp"))
    assert "7-bit" not in card
    assert "asimddp; without, gpt2-edge's own runtime takes 7-bit activations" in card_of(
        tmp_path, "124M", ("avx_vnni", "asimddp"), narrows=True
    )
    for line in (
        "# 124M, int8",
        "124,439,808 parameters as an ONNX package for cpu, made by gpt2-edge 9.9",
        "| source | 124M (safetensors), weights sha256 f00d |",
        "| shape | 12 layers, 12 heads, 768 wide, context 1024, vocabulary 50,257 |",
        "| size | 125.5 MB of weights and graph |",
        "| needs | onnxruntime 1.2.3 or newer, a processor with avx_vnni or asimddp |",
        "| 0.0012 | 98.7% | 0.5 |",
        "over 148 tokens",
    ):
        assert line in card


def test_the_card_takes_any_name_as_it_is(tmp_path: Path) -> None:
    assert "# {x} %s äöü, int8" in card_of(tmp_path, "{x} %s äöü")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_packages_card_is_of_its_manifest(
    request: pytest.FixtureRequest, tmp_path: Path, precision: Precision
) -> None:
    package: Path = request.getfixturevalue(f"tiny_{precision}")
    write_model_card(tmp_path, read_manifest(package))
    assert (tmp_path / "MODEL_CARD.md").read_bytes() == (package / "MODEL_CARD.md").read_bytes()
