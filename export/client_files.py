"""The small files of a package that other clients read, its card and its licence.

optimum and transformers read config.json and generation_config.json, transformers.js the same with a section of its
own, onnxruntime-genai its genai_config.json. Values come from the GPT2Config, so that every layout of a checkpoint
gives the same files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.config import GPT2Config
from runtime.package import (
    ATTENTION_MASK,
    CACHE_KINDS,
    CONFIG,
    GENAI_CONFIG,
    GENERATION_CONFIG,
    INPUT_IDS,
    LICENSE,
    LOGITS,
    MODEL_CARD,
    MODEL_FILES,
    POSITION_IDS,
    Attention,
    Device,
    Manifest,
    Precision,
)
from runtime.sampling import SamplingOptions

TRANSFORMERS_JS_DTYPE: Mapping[Precision, str] = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "int4": "q4"}
GENAI_PROVIDERS: Mapping[Device, str] = {"cuda": "cuda", "tensorrt": "NvTensorRtRtx"}
"""onnxruntime-genai's names; its TensorRT is the one for RTX."""

LICENSE_NAMES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "COPYING")

CARD = """\
# {name}, {precision}

A GPT-2 language model of {parameters:,} parameters as an ONNX package for {device}, made by gpt2-edge {version}. It
continues text; what it writes may be false or offensive, and it has the limits of the checkpoint that it came from.

| | |
|---|---|
| source | {source} ({layout}), weights sha256 {fingerprint} |
| shape | {n_layer} layers, {n_head} heads, {n_embd} wide, context {n_ctx}, vocabulary {n_vocab:,} |
| graph | opset {opset}, {attention} |
| precision | {precision}: {recipe} |
| size | {megabytes:.1f} MB of weights and graph |
| needs | onnxruntime {onnxruntime} or newer{processor}{without_features} |

## What it cost in quality

Against the source's own float32 weights, computed independently in numpy, over {tokens:.0f} tokens of built-in
prompts and their greedy continuations (an alarm, not a benchmark):

| KL divergence, nats a token | same most probable token | largest difference of a logit |
|---|---|---|
| {kl:.2g} | {top1:.1%} | {largest_difference:.2g} |

## Use

    python -m runtime.generate FOLDER "Once upon a time"
    python -m runtime.verify FOLDER --full

{other_clients}
"""

OTHER_CLIENTS: Mapping[Device, str] = {
    "cpu": "The folder also opens unmodified in optimum's ORTModelForCausalLM, in onnxruntime-genai and in "
    "transformers.js;\ngpt2-edge's README has the versions that were tried.",
    "cuda": "Batches must be padded on the right, as onnxruntime-genai does. optimum and transformers.js pad on the "
    "left, and\nget wrong numbers from this graph for all rows but the longest.",
    "tensorrt": "Other clients have not been tried with this graph.",
}
WITHOUT_FEATURES = "; without, gpt2-edge's own runtime takes 7-bit activations, and other clients compute wrongly"

ATTENTIONS: Mapping[Attention, str] = {
    "GroupQueryAttention": "attention by GroupQueryAttention, which writes keys and values in place",
    "plain": "attention by ONNX's own operators, which returns keys and values in new tensors",
}


def write_client_files(
    folder: Path,
    config: GPT2Config,
    precision: Precision,
    *,
    device: Device = "cpu",
    attention: Attention = "GroupQueryAttention",
) -> None:
    """Write config.json, generation_config.json and genai_config.json."""
    _write_json(folder / CONFIG, _hf_config(config, precision, device))
    _write_json(folder / GENERATION_CONFIG, _generation_config(config))
    _write_json(folder / GENAI_CONFIG, _genai_config(config, precision, device, attention))


def write_license(folder: Path, checkpoint_folder: Path) -> None:
    """Copy the checkpoint's licence, or say that it came without one."""
    for name in LICENSE_NAMES:
        if (checkpoint_folder / name).is_file():
            shutil.copyfile(checkpoint_folder / name, folder / LICENSE)
            return
    (folder / LICENSE).write_text(
        "The checkpoint that this package was made from came without a licence file.\n"
        "The licence of its weights applies to this package; ask whoever you had them from.\n",
        encoding="utf-8",
    )


def write_model_card(folder: Path, manifest: Manifest) -> None:
    """Write MODEL_CARD.md from the manifest."""
    config, model, needs = manifest.config, MODEL_FILES[manifest.precision], manifest.needs
    size = sum(entry.bytes for name, entry in manifest.files.items() if name.startswith(model))
    text = CARD.format(
        **config.to_dict(),
        **manifest.quality,
        name=manifest.source.name,
        precision=manifest.precision,
        parameters=config.parameter_count,
        device=manifest.device,
        opset=manifest.opset,
        attention=ATTENTIONS[manifest.attention],
        version=manifest.tools["gpt2-edge"],
        source=manifest.source.name,
        layout=manifest.source.layout,
        fingerprint=manifest.source.fingerprint,
        recipe="; ".join(manifest.recipe.values()),
        megabytes=size / 1e6,
        onnxruntime=needs.onnxruntime,
        other_clients=OTHER_CLIENTS[manifest.device],
        processor=f", a processor with {' or '.join(needs.processor)}" if needs.processor else "",
        without_features=WITHOUT_FEATURES if needs.narrows else "",
    )
    (folder / MODEL_CARD).write_text(text, encoding="utf-8")


def _hf_config(config: GPT2Config, precision: Precision, device: Device) -> dict[str, Any]:
    model_name, dtype = Path(MODEL_FILES[precision]).name, TRANSFORMERS_JS_DTYPE[precision]
    half_cache = {} if device == "cpu" else {"kv_cache_dtype": {dtype: "float16"}}
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": config.activation,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "n_positions": config.n_ctx,
        "n_ctx": config.n_ctx,
        "vocab_size": config.n_vocab,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "scale_attn_weights": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.eos_token_id,
        "eos_token_id": config.eos_token_id,
        "transformers.js_config": {
            "dtype": dtype,
            "use_external_data_format": {model_name: 1},
            **half_cache,
        },
    }


def _generation_config(config: GPT2Config) -> dict[str, Any]:
    sampling = SamplingOptions()
    return {
        "bos_token_id": config.eos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.eos_token_id,
        "do_sample": sampling.do_sample,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
    }


def _genai_config(config: GPT2Config, precision: Precision, device: Device, attention: Attention) -> dict[str, Any]:
    """ "type" is "decoder": genai's own "gpt2" means an older graph with one 5-D cache tensor per layer."""
    key, value = CACHE_KINDS
    sampling = SamplingOptions()
    providers: dict[str, Any] = (
        {} if device == "cpu" else {"session_options": {"provider_options": [{GENAI_PROVIDERS[device]: {}}]}}
    )
    return {
        "model": {
            "type": "decoder",
            "vocab_size": config.n_vocab,
            "context_length": config.n_ctx,
            "bos_token_id": config.eos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.eos_token_id,
            "decoder": {
                "filename": MODEL_FILES[precision],
                **providers,
                "head_size": config.head_dim,
                "hidden_size": config.n_embd,
                "num_attention_heads": config.n_head,
                "num_key_value_heads": config.n_head,
                "num_hidden_layers": config.n_layer,
                "inputs": {
                    "input_ids": INPUT_IDS,
                    "attention_mask": ATTENTION_MASK,
                    "position_ids": POSITION_IDS,
                    "past_key_names": f"past_key_values.%d.{key}",
                    "past_value_names": f"past_key_values.%d.{value}",
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": f"present.%d.{key}",
                    "present_value_names": f"present.%d.{value}",
                },
            },
        },
        "search": {
            "do_sample": sampling.do_sample,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "past_present_share_buffer": attention == "GroupQueryAttention",
        },
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
