"""Every layout and every variation of GPT-2, converted, against torch running the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from export.checkpoint import read_checkpoint
from export.convert import convert
from runtime.package import open_package
from runtime.text_generator import open_decoder
from tests.conftest import BYTES_AND_END, DEMO_CHECKPOINT
from tests.tiny import Weights, tiny_weights, write_safetensors_checkpoint
from tests.write_layouts import write_bin_checkpoint, write_llmc_checkpoint, write_nanogpt_checkpoint
from tests.write_tensorbundle import write_openai_checkpoint

LARGEST_ERROR = 1e-5
"""Of a logit, against torch. Measured: 1.4e-6."""

PADDED_VOCAB = 320
"""`BYTES_AND_END` tokens, rounded up to a multiple of 64."""

EXACT, TANH = "BiasGelu", "FastGelu"
"""Operators of the two forms of GELU."""

VARIATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "exact gelu": {"activation_function": "gelu"},
    "another tanh gelu": {"activation_function": "gelu_pytorch_tanh"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "narrow": {"n_inner": 40},
    "unscaled": {"scale_attn_weights": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "scaled by layer alone": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "untied": {"tie_word_embeddings": False},
    "epsilon": {"layer_norm_epsilon": 1e-2},
    "short context": {"n_positions": 37},
    "rows without tokens": {"vocab_size": 263},
    "all at once": {
        "activation_function": "silu",
        "n_inner": 72,
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": False,
        "layer_norm_epsilon": 1e-3,
        "n_positions": 41,
        "vocab_size": 300,
    },
}

Float32Array = NDArray[np.float32]


@pytest.mark.parametrize("variation", VARIATIONS)
def test_a_variation_gives_the_logits_of_transformers(
    tmp_path: Path, tiny_checkpoint: Path, torch: Any, transformers: Any, variation: str
) -> None:
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": BYTES_AND_END}
    config = transformers.GPT2Config(
        **{**sizes, "bos_token_id": 256, "eos_token_id": 256, **VARIATIONS[variation]}, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that every part of the model shows in the logits
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "checkpoint")
    ids = np.random.default_rng(1).integers(0, BYTES_AND_END, config.n_positions)
    with torch.inference_mode():
        expected = model(torch.tensor(ids)[None]).logits[0].numpy()  # [T, V]
    package = convert(
        tmp_path / "checkpoint", tmp_path / "package", precision="fp32", tokenizer_dir=tiny_checkpoint
    ).package
    np.testing.assert_allclose(our_logits(package, ids), expected, rtol=0, atol=LARGEST_ERROR)


@pytest.mark.parametrize("biases", [True, False])
def test_nanogpt_gives_the_logits_of_its_own_forward_pass(
    tmp_path: Path, tiny_checkpoint: Path, torch: Any, biases: bool
) -> None:
    config = read_checkpoint(tiny_checkpoint).config
    weights = {name: values for name, values in tiny_weights(config).items() if biases or not name.endswith(".bias")}
    folder = write_nanogpt_checkpoint(
        tmp_path / "out", config, weights, padded_vocab=PADDED_VOCAB, tokenizer_dir=tiny_checkpoint
    )
    package = convert(folder / "ckpt.pt", tmp_path / "package", precision="fp32").package
    manifest = open_package(package).manifest
    assert (manifest.source.name, manifest.source.layout) == ("out", "nanogpt")
    assert (manifest.config.n_vocab, manifest.config.eos_token_id) == (BYTES_AND_END, 256)
    ids = np.random.default_rng(1).integers(0, BYTES_AND_END, config.n_ctx)
    expected = nanogpt_logits(torch, torch.load(folder / "ckpt.pt", weights_only=True), ids)[:, :BYTES_AND_END]
    np.testing.assert_allclose(our_logits(package, ids), expected, rtol=0, atol=LARGEST_ERROR)


def test_the_demo_in_six_layouts_gives_the_same_weights(tmp_path: Path, demo_fp32: Path, torch: Any) -> None:
    demo = read_checkpoint(DEMO_CHECKPOINT)
    weights: Weights = dict(demo.tensors)
    writers: dict[str, Callable[..., Path]] = {
        "openai-tensorflow": write_openai_checkpoint,
        "safetensors": write_safetensors_checkpoint,
        "safetensors-sharded": partial(write_safetensors_checkpoint, shards=3),
        "hugging-face-bin": write_bin_checkpoint,
        "nanogpt": partial(write_nanogpt_checkpoint, padded_vocab=8256),
        "llm.c": partial(write_llmc_checkpoint, padded_vocab=8320),
    }
    expected = open_package(demo_fp32).manifest
    for layout, write in writers.items():
        folder = write(tmp_path / layout, demo.config, weights, tokenizer_dir=DEMO_CHECKPOINT)
        package = convert(folder, tmp_path / "packages" / layout, precision="fp32").package
        manifest = open_package(package, full=True).manifest
        assert manifest.source.layout == layout
        assert manifest.source.fingerprint == expected.source.fingerprint
        assert manifest.files["onnx/model.onnx_data"] == expected.files["onnx/model.onnx_data"]
        assert manifest.files["tokenizer.json"] == expected.files["tokenizer.json"]
        if layout == "nanogpt":
            assert manifest.config.activation == "gelu"
            assert_differ_in_activation(package, demo_fp32)
        else:
            assert manifest.config == expected.config
            assert manifest.files["onnx/model.onnx"] == expected.files["onnx/model.onnx"]


def assert_differ_in_activation(ours: Path, other: Path) -> None:
    models = [onnx.load(package / "onnx" / "model.onnx", load_external_data=False) for package in (ours, other)]
    swapped = 0
    for node, counterpart in zip(models[0].graph.node, models[1].graph.node, strict=True):
        if node != counterpart:
            assert (node.op_type, counterpart.op_type) == (EXACT, TANH)
            node.op_type = TANH
            swapped += 1
    assert swapped == 6  # one a layer
    assert models[0] == models[1]


def our_logits(package: Path, ids: NDArray[np.int64]) -> Float32Array:
    """[T, V]"""
    return np.concatenate([piece.copy() for piece in open_decoder(open_package(package)).logits(ids)])


def nanogpt_logits(torch: Any, checkpoint: dict[str, Any], ids: NDArray[np.int64]) -> Float32Array:
    """The forward pass of nanoGPT's model, from its description: exact GELU, linear layers [out, in], [T, V]."""
    functional = torch.nn.functional
    model = {name.removeprefix("_orig_mod.transformer."): tensor for name, tensor in checkpoint["model"].items()}
    heads, width = checkpoint["model_args"]["n_head"], checkpoint["model_args"]["n_embd"]

    def linear(x: Any, name: str) -> Any:
        return functional.linear(x, model[f"{name}.weight"], model.get(f"{name}.bias"))

    def norm(x: Any, name: str) -> Any:
        return functional.layer_norm(x, (width,), model[f"{name}.weight"], model.get(f"{name}.bias"), 1e-5)

    x = model["wte.weight"][torch.tensor(ids)] + model["wpe.weight"][: len(ids)]
    for layer in range(checkpoint["model_args"]["n_layer"]):
        block = f"h.{layer}"
        q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(width, dim=-1)
        q, k, v = (part.view(len(ids), heads, -1).transpose(0, 1)[None] for part in (q, k, v))  # [1, H, T, D]
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1).flatten(1)
        x = x + linear(attended, f"{block}.attn.c_proj")
        inner = functional.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        x = x + linear(inner, f"{block}.mlp.c_proj")
    logits: Float32Array = (norm(x, "ln_f") @ model["wte.weight"].T).numpy()
    return logits
