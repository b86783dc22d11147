"""Checkpoints as Hugging Face's .bin, nanoGPT's ckpt.pt and llm.c's .bin, written from canonical weights."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

from runtime.config import GPT2Config

from .conformance.conftest import import_client
from .tiny import Weights, hugging_face_config

LLMC_ORDER = (
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"),
    *("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
)


def need_torch() -> Any:
    """torch, or the end of the test, as for the clients of the conformance tests."""
    return import_client("torch")


def state_dict(weights: Weights, *, prefix: str = "transformer.", tied_head: bool = True) -> dict[str, Any]:
    """Canonical weights as torch's tensors; as transformers does, the tied head is the embedding itself."""
    torch = need_torch()
    tensors = {
        name if name == "lm_head.weight" else prefix + name: torch.from_numpy(np.array(values, order="C"))
        for name, values in weights.items()
    }
    if tied_head:
        tensors.setdefault("lm_head.weight", tensors[f"{prefix}wte.weight"])
    return tensors


def write_bin_checkpoint(
    folder: Path, config: GPT2Config, weights: Weights, shards: int = 1, *, tokenizer_dir: Path | None = None
) -> Path:
    """Write config.json and pytorch_model.bin, or several with an index, as transformers did before safetensors."""
    torch = need_torch()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = state_dict(weights)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        weight_map: dict[str, str] = {}
        for shard in range(shards):
            file_name = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
            part = {name: tensors[name] for name in list(tensors)[shard::shards]}
            torch.save(part, folder / file_name)
            weight_map |= dict.fromkeys(part, file_name)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(hugging_face_config(config)))
    return _with_tokenizer(folder, tokenizer_dir)


def write_nanogpt_checkpoint(
    folder: Path,
    config: GPT2Config,
    weights: Weights,
    *,
    wrapper: str = "_orig_mod.",
    padded_vocab: int | None = None,
    tokenizer_dir: Path | None = None,
    **model_args: object,
) -> Path:
    """Write ckpt.pt with all that nanoGPT's training puts into it; without biases if `weights` has none."""
    torch = need_torch()
    folder.mkdir(parents=True, exist_ok=True)
    padding = (padded_vocab or config.n_vocab) - config.n_vocab
    stored = {name: _turned(name, values) for name, values in weights.items()}
    stored["wte.weight"] = np.pad(stored["wte.weight"], ((0, padding), (0, 0)), constant_values=0.5)
    model = {wrapper + name: tensor for name, tensor in state_dict(stored).items()}
    arguments = {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.n_ctx,
        "bias": "ln_f.bias" in weights,
        "vocab_size": config.n_vocab + padding,
        "dropout": 0.0,
    }
    checkpoint = {
        "model": model,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2, 3).t()}}, "param_groups": [{"lr": 6e-4, "params": [0]}]},
        "model_args": arguments | model_args,
        "iter_num": 5,
        "best_val_loss": torch.tensor(3.2),
        "config": {"out_dir": "out", "learning_rate": 6e-4, "compile": True, "eval_only": False},
    }
    torch.save(checkpoint, folder / "ckpt.pt")
    return _with_tokenizer(folder, tokenizer_dir)


def write_llmc_checkpoint(
    folder: Path,
    config: GPT2Config,
    weights: Weights,
    *,
    version: int = 3,
    padded_vocab: int | None = None,
    tokenizer_dir: Path | None = None,
) -> Path:
    """Write gpt2.bin; bfloat16 (version 5) is the upper half of each float32, rounded towards zero."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = padded_vocab or -(-config.n_vocab // 128) * 128
    sizes = (config.n_ctx, config.n_vocab, config.n_layer, config.n_head, config.n_embd, rows)
    padding = ((0, rows - config.n_vocab), (0, 0))
    parts = [np.pad(weights["wte.weight"], padding, constant_values=np.nan), weights["wpe.weight"]]
    parts += [
        np.stack([_turned(f"h.{layer}.{name}", weights[f"h.{layer}.{name}"]) for layer in range(config.n_layer)])
        for name in LLMC_ORDER
    ]
    parts += [weights["ln_f.weight"], weights["ln_f.bias"]]
    with (folder / "gpt2.bin").open("wb") as file:
        file.write(struct.pack("<8i", 20240326, version, *sizes).ljust(1024, b"\0"))
        for part in parts:
            values = np.ascontiguousarray(part, np.float32)
            file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes() if version == 5 else values.tobytes())
    return _with_tokenizer(folder, tokenizer_dir)


def _turned(name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Matrices of the blocks as [out, in]."""
    return values.T if name.startswith("h.") and values.ndim == 2 else values


def _with_tokenizer(folder: Path, tokenizer_dir: Path | None) -> Path:
    if tokenizer_dir is not None:
        for file_name in ("vocab.json", "merges.txt"):
            shutil.copy(tokenizer_dir / file_name, folder / file_name)
    return folder
