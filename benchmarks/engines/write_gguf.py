"""A Hugging Face GPT-2 folder -> a GGUF file for llama.cpp: write_gguf.py CHECKPOINT TYPE OUTPUT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import quants
from safetensors import safe_open

FILE_TYPE = {"F32": 0, "F16": 1, "Q8_0": 7, "Q4_0": 2}
NAMES = {
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def main(checkpoint: Path, kind: str, output: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(str(output), "gpt2")
    writer.add_name("gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(FILE_TYPE[kind])
    _add_vocabulary(writer, checkpoint)
    with safe_open(checkpoint / "model.safetensors", "numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
            _add_tensor(writer, name.removeprefix("transformer."), tensors.get_tensor(name), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, checkpoint: Path) -> None:
    vocabulary = json.loads((checkpoint / "vocab.json").read_text())
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in tokens])
    writer.add_token_merges([line for line in (checkpoint / "merges.txt").read_text().split("\n")[1:] if line])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)


def _add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    module, _, part = name.rpartition(".")
    if module.startswith("h."):
        _, layer, inner = module.split(".", 2)
        theirs = f"blk.{layer}.{NAMES[inner]}.{part}"
    else:
        theirs = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}[module] + f".{part}"
    array = array.astype(np.float32)
    if array.ndim == 2 and module not in ("wte", "wpe"):
        array = array.T  # llama.cpp has [out, in]
    array = np.ascontiguousarray(array)
    if array.ndim == 2 and module != "wpe" and kind != "F32":
        quant_type = getattr(gguf.GGMLQuantizationType, kind)
        writer.add_tensor(theirs, quants.quantize(array, quant_type), raw_dtype=quant_type)
    else:
        writer.add_tensor(theirs, array)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
