"""A seeded tiny GPT-2 for tests, and how it becomes a Hugging Face folder on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from export.checkpoint import canonical_shapes
from runtime.config import GPT2Config

Weights = Mapping[str, np.ndarray[Any, np.dtype[Any]]]


def tiny_config() -> GPT2Config:
    """Two layers, and a vocabulary that is no multiple of anything."""
    return GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=64, n_vocab=131, n_inner=128, eos_token_id=130)


def tiny_weights(config: GPT2Config, seed: int = 0) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Canonical name -> float32: large enough that every part of the model shows in the logits, gains near 1."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in canonical_shapes(config).items():
        values = 0.1 * rng.standard_normal(shape, dtype=np.float32)
        weights[name] = values + np.float32(1) if ".ln_" in f".{name}" and name.endswith(".weight") else values
    return weights


def write_safetensors_checkpoint(
    folder: Path,
    config: GPT2Config,
    weights: Weights,
    shards: int = 1,
    *,
    prefix: str = "transformer.",
    tokenizer_dir: Path | None = None,
    **config_fields: object,
) -> Path:
    """Write a folder as transformers does: one model.safetensors, or several with an index, and config.json.

    Args:
        folder: is made if it is not there.
        config: what config.json says.
        weights: canonical names; stored in the dtype that they have.
        shards: number of weight files.
        prefix: before every name but lm_head.weight.
        tokenizer_dir: a folder to copy vocab.json and merges.txt from.
        config_fields: further fields of config.json, or other values for the ones that are there.
    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spelled = {name if name == "lm_head.weight" else prefix + name: values for name, values in weights.items()}
    if shards == 1:
        save_file(spelled, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for shard in range(shards):
            file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: spelled[name] for name in list(spelled)[shard::shards]}
            save_file(part, folder / file_name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file_name)
        total = sum(values.nbytes for values in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(hugging_face_config(config) | config_fields))
    if tokenizer_dir is not None:
        for file_name in ("vocab.json", "merges.txt"):
            shutil.copy(tokenizer_dir / file_name, folder / file_name)
    return folder


def hugging_face_config(config: GPT2Config) -> dict[str, Any]:
    """The same numbers as transformers spells them."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": config.activation,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.n_ctx,
        "n_inner": config.n_inner,
        "vocab_size": config.n_vocab,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "scale_attn_weights": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.eos_token_id,
        "eos_token_id": config.eos_token_id,
    }
