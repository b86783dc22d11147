"""What a checkpoint's own config file says -> GPT2Config. A field that changes the function is supported or refused."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.config import Activation, GPT2Config
from runtime.errors import CheckpointError, ConfigError

from .checkpoint_files import read_json_object
from .llmc_file import LlmcHeader

SIZE_LIMIT = 1 << 31  # above every size of every GPT-2, and small enough that products of sizes stay harmless

# Hugging Face's name of an activation -> ours. The tanh forms differ in how they round, not in what they compute.
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# Our name of a size -> its names in config.json; transformers reads the later ones as other names of the first.
HF_SIZES: Mapping[str, tuple[str, ...]] = {
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_embd": ("n_embd", "hidden_size"),
    "n_ctx": ("n_positions", "max_position_embeddings"),  # n_ctx itself: see read_hf_config
    "n_vocab": ("vocab_size",),
}

# Fields of config.json that make another function out of the same tensors, or tensors that are no plain weights.
HF_REFUSED = (
    "add_cross_attention",
    "is_encoder_decoder",
    "pruned_heads",
    "quantization_config",
    "compression_config",
    "auto_map",  # names modelling code that comes with the checkpoint
)

# Fields of config.json that have the same name and meaning here, and what transformers assumes where they are absent.
HF_DEFAULTS: Mapping[str, bool | float] = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
DEFAULT_EOS = 50256  # likewise, where the vocabulary reaches as far

HPARAMS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
MODEL_ARGS = {  # our name of a size -> nanoGPT's
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_ctx": "block_size",
    "n_vocab": "vocab_size",
}
HPARAMS_OF_TRAINING = {"attn_dropout", "embd_dropout", "res_dropout", "resid_dropout"}  # no effect afterwards


def read_hf_config(path: Path) -> tuple[dict[str, Any], GPT2Config]:
    """Read a Hugging Face config.json.

    n_positions is the context length; n_ctx, which old versions of transformers wrote beside it and none reads now,
    counts only where n_positions is absent. reorder_and_upcast_attn is the same function in float32, so it has no say.
    Fields that have a default take transformers' own; a size never does.

    Args:
        path: the file.
    Returns:
        All that the file says, and the configuration that it declares.
    Raises:
        CheckpointError: it is no JSON object, a size is missing, a value is out of range, or a field asks for what is
            not supported; all are named.
    """
    values = read_json_object(path)
    faults = _unsupported(values)
    activation = values.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        faults.append(f"activation_function is {reprlib.repr(activation)}, expected one of {', '.join(ACTIVATIONS)}")
    sizes = {ours: _read_size(values, names, faults) for ours, names in HF_SIZES.items() if ours != "n_ctx"}
    only_n_ctx = "n_ctx" in values and not any(name in values for name in HF_SIZES["n_ctx"])
    sizes["n_ctx"] = _read_size(values, ("n_ctx",) if only_n_ctx else HF_SIZES["n_ctx"], faults)
    if values.get("n_inner") is None:
        sizes["n_inner"] = 4 * sizes["n_embd"]
    else:
        sizes["n_inner"] = _read_size(values, ("n_inner",), faults)
    scalars = {name: values.get(name, default) for name, default in HF_DEFAULTS.items()}
    scalars["eos_token_id"] = _eos_token_id(values, sizes["n_vocab"])
    faults += [
        f"{name} is {reprlib.repr(value)}, expected a number or a truth value"
        for name, value in scalars.items()
        if not isinstance(value, (bool, int, float))
    ]
    _refuse(path, faults)
    return values, _validated(path, **sizes, **scalars, activation=ACTIVATIONS[activation])


def read_hparams(path: Path) -> tuple[dict[str, Any], GPT2Config]:
    """Read OpenAI's hparams.json: five sizes, the rest is the same for every release.

    Args:
        path: the file.
    Returns:
        All that the file says, and the configuration; `<|endoftext|>` is the last id of the vocabulary.
    Raises:
        CheckpointError: it is no JSON object, a size is missing or out of range, or there is a field that OpenAI's
            code does not know; all are named.
    """
    values = read_json_object(path)
    unknown = sorted(set(values) - set(HPARAMS) - HPARAMS_OF_TRAINING)
    faults = [f"fields {reprlib.repr(unknown)} are not supported"] if unknown else []
    sizes = {name: _read_size(values, (name,), faults) for name in HPARAMS}
    _refuse(path, faults)
    return values, _validated(path, **sizes, n_inner=4 * sizes["n_embd"], eos_token_id=sizes["n_vocab"] - 1)


def read_model_args(path: Path, values: Mapping[Any, Any]) -> tuple[GPT2Config, bool]:
    """Read nanoGPT's model_args: its sizes; its activation is the exact GELU, the rest is as OpenAI's.

    Args:
        path: the checkpoint, for messages.
        values: what stands in it under model_args.
    Returns:
        The configuration, and whether there are biases. `<|endoftext|>` is where GPT-2's tokenizer has it, or the last
        row: nanoGPT does not say.
    Raises:
        CheckpointError: a size is missing or out of range, or there is a field that is not nanoGPT's; all are named.
    """
    unknown = sorted(str(name) for name in set(values) - {*MODEL_ARGS.values(), "bias", "dropout"})
    faults = [f"fields {reprlib.repr(unknown)} of model_args are not supported"] if unknown else []
    sizes = {ours: _read_size(values, (theirs,), faults) for ours, theirs in MODEL_ARGS.items()}
    has_biases = values.get("bias", True)
    if type(has_biases) is not bool:
        faults.append(f"bias is {reprlib.repr(has_biases)}, expected true or false")
    _refuse(path, faults)
    return _of_trainer(path, activation="gelu", **sizes), has_biases


def read_llmc_header(path: Path, header: LlmcHeader) -> GPT2Config:
    """What llm.c's header says; the rest is as OpenAI's, `<|endoftext|>` as in `read_model_args`.

    Raises:
        CheckpointError: two numbers contradict each other.
    """
    sizes = {name: getattr(header, name) for name in ("n_layer", "n_head", "n_embd", "n_ctx", "n_vocab")}
    return _of_trainer(path, **sizes)


def _of_trainer(path: Path, **numbers: Any) -> GPT2Config:
    eos_token_id = min(DEFAULT_EOS, numbers["n_vocab"] - 1)
    return _validated(path, **numbers, n_inner=4 * numbers["n_embd"], eos_token_id=eos_token_id)


def _unsupported(values: Mapping[str, Any]) -> list[str]:
    faults = [f"{name} is {reprlib.repr(values[name])}, not supported" for name in HF_REFUSED if values.get(name)]
    if values.get("model_type") != "gpt2":
        faults.append(f"model_type is {reprlib.repr(values.get('model_type'))}, expected 'gpt2'")
    if values.get("is_causal", True) is not True:
        faults.append(f"is_causal is {reprlib.repr(values['is_causal'])}, expected true")
    return faults


def _read_size(values: Mapping[str, Any], names: tuple[str, ...], faults: list[str]) -> int:
    """The size that stands under one of its names; 1 beside a fault, so that the rest can be looked at too."""
    found = {name: values[name] for name in names if name in values}
    if not found:
        faults.append(f"{names[0]} is missing")
        return 1
    for name, value in found.items():
        if type(value) is not int or not 0 < value < SIZE_LIMIT:
            faults.append(f"{name} is {reprlib.repr(value)}, expected a whole number above 0")
            return 1
    if len(set(found.values())) > 1:
        faults.append(" but ".join(f"{name} is {value}" for name, value in found.items()))
    return int(found[next(iter(found))])


def _eos_token_id(values: Mapping[str, Any], n_vocab: int) -> Any:
    """The id as written, or what transformers assumes, within the vocabulary; a list of one id is that id."""
    written = values.get("eos_token_id", min(DEFAULT_EOS, n_vocab - 1))
    return written[0] if isinstance(written, list) and len(written) == 1 else written


def _validated(path: Path, **numbers: Any) -> GPT2Config:
    try:
        return GPT2Config(**numbers)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _refuse(path: Path, faults: list[str]) -> None:
    if faults:
        raise CheckpointError(f"{path}: {'; '.join(faults)}")
