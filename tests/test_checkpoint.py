from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from export.checkpoint import Checkpoint, canonical_shapes, read_checkpoint
from runtime.config import OFFICIAL_SIZES, GPT2Config
from runtime.errors import CheckpointError
from tests.tiny import hugging_face_config, tiny_config, tiny_weights, write_safetensors_checkpoint
from tests.write_tensorbundle import openai_name, write_bundle, write_openai_checkpoint

DEMO = Path(__file__).parent.parent / "models" / "demo"
CONFIG = tiny_config()
WEIGHTS = tiny_weights(CONFIG)
WRITERS: dict[str, Callable[..., Path]] = {
    "safetensors": write_safetensors_checkpoint,
    "safetensors-sharded": partial(write_safetensors_checkpoint, shards=3),
    "openai-tensorflow": write_openai_checkpoint,
}
FIVE_SIZES = {"n_vocab": 131, "n_ctx": 64, "n_embd": 32, "n_head": 2, "n_layer": 2}


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_tensors(checkpoint: Checkpoint, expected: dict[str, Any]) -> None:
    assert list(checkpoint.tensors) == list(canonical_shapes(checkpoint.config))
    assert set(checkpoint.tensors) == set(expected)
    for name, shape in canonical_shapes(checkpoint.config).items():
        values = checkpoint.tensors[name]
        assert values.shape == shape
        assert values.dtype == np.float32
        assert values.flags.c_contiguous
        np.testing.assert_array_equal(values.view(np.uint32), expected[name].astype(np.float32).view(np.uint32))


# --- the canonical mapping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", OFFICIAL_SIZES)
@pytest.mark.parametrize("tied", [True, False])
def test_canonical_shapes_hold_every_parameter(size: str, tied: bool) -> None:
    config = replace(OFFICIAL_SIZES[size], tie_word_embeddings=tied)
    shapes = canonical_shapes(config)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == config.parameter_count
    assert len(shapes) == 12 * config.n_layer + (4 if tied else 5)


def test_canonical_order_is_that_of_the_forward_pass() -> None:
    names = list(canonical_shapes(CONFIG))
    assert names[:4] == ["wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.0.ln_1.bias"]
    assert names[13:15] == ["h.0.mlp.c_proj.bias", "h.1.ln_1.weight"]
    assert names[-2:] == ["ln_f.weight", "ln_f.bias"]


@pytest.mark.parametrize("layout", WRITERS)
def test_layouts_of_the_demo_model_agree_bit_for_bit(tmp_path: Path, layout: str) -> None:
    demo = read_checkpoint(DEMO)
    stored = {
        name.removeprefix("transformer."): values for name, values in load_file(DEMO / "model.safetensors").items()
    }
    assert_same_tensors(demo, stored)
    checkpoint = read_checkpoint(WRITERS[layout](tmp_path, demo.config, dict(demo.tensors)))
    assert checkpoint.layout == layout
    assert checkpoint.folder == tmp_path
    assert checkpoint.config == demo.config
    assert_same_tensors(checkpoint, stored)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_names_with_and_without_prefix(tmp_path: Path, prefix: str) -> None:
    folder = write_safetensors_checkpoint(tmp_path, CONFIG, WEIGHTS, prefix=prefix)
    assert_same_tensors(read_checkpoint(folder), WEIGHTS)


def test_mask_buffers_are_dropped(tmp_path: Path) -> None:
    buffers = {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.uint8), "h.1.attn.masked_bias": np.full((), -np.inf)}
    folder = write_safetensors_checkpoint(tmp_path, CONFIG, {**WEIGHTS, **buffers})
    assert_same_tensors(read_checkpoint(folder), WEIGHTS)


def test_tensors_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    folder = write_safetensors_checkpoint(tmp_path, CONFIG, WEIGHTS)
    tensors = read_checkpoint(folder).tensors
    (folder / "model.safetensors").unlink()
    assert "wte.weight" in tensors
    assert "transformer.wte.weight" not in tensors
    assert len(tensors) == 28
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: No such file or directory"):
        tensors["wte.weight"]
    with pytest.raises(KeyError):
        tensors["wte"]


def test_the_own_fields_of_the_config_come_through(tmp_path: Path) -> None:
    folder = write_safetensors_checkpoint(tmp_path, CONFIG, WEIGHTS, bos_token_id=7, task_specific_params={"a": 1})
    source = read_checkpoint(folder).source_config
    assert source["bos_token_id"] == 7
    assert source["task_specific_params"] == {"a": 1}


# --- the head ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False])
def test_a_head_equal_to_the_embedding_is_tied(tmp_path: Path, declared: bool) -> None:
    weights = {**WEIGHTS, "lm_head.weight": WEIGHTS["wte.weight"].copy()}
    checkpoint = read_checkpoint(write_safetensors_checkpoint(tmp_path, CONFIG, weights, tie_word_embeddings=declared))
    assert checkpoint.config == CONFIG
    assert_same_tensors(checkpoint, WEIGHTS)


def test_a_head_of_its_own_is_read(tmp_path: Path) -> None:
    config = replace(CONFIG, tie_word_embeddings=False)
    weights = tiny_weights(config)
    checkpoint = read_checkpoint(write_safetensors_checkpoint(tmp_path, config, weights, shards=2))
    assert checkpoint.config == config
    assert list(checkpoint.tensors)[-1] == "lm_head.weight"
    assert_same_tensors(checkpoint, weights)


def test_a_different_head_that_the_config_ties_is_refused(tmp_path: Path) -> None:
    weights = {**WEIGHTS, "lm_head.weight": WEIGHTS["wte.weight"].copy()}
    weights["lm_head.weight"][-1, -1] += 1e-3
    message = refusal(write_safetensors_checkpoint(tmp_path, CONFIG, weights))
    assert "1 fault in its tensors: lm_head.weight differs from transformer.wte.weight" in message
    assert "set it to false to use both" in message


def test_an_untied_head_that_is_missing_is_refused(tmp_path: Path) -> None:
    folder = write_safetensors_checkpoint(tmp_path, CONFIG, WEIGHTS, tie_word_embeddings=False)
    assert refusal(folder).endswith("1 fault in its tensors: lm_head.weight is missing")


# --- faults of tensors -------------------------------------------------------------------------------------------


def test_all_faults_of_headers_and_of_values_are_named_at_once(tmp_path: Path) -> None:
    weights: dict[str, Any] = {name: values.copy() for name, values in WEIGHTS.items()}
    del weights["h.0.ln_1.bias"]
    weights["adapter.weight"] = np.zeros(3, np.float32)
    weights["h.1.mlp.c_fc.bias"] = np.zeros(127, np.float32)
    weights["h.1.ln_2.weight"] = np.zeros(32, np.int64)
    weights["h.0.attn.c_attn.weight"][3, 4] = np.nan
    weights["wpe.weight"][0, 1] = np.inf
    expected = (
        "6 faults in its tensors: transformer.h.0.ln_1.bias is missing; "
        "transformer.adapter.weight is no tensor of this GPT-2; "
        "transformer.h.1.mlp.c_fc.bias is [127], expected [128]; "
        "transformer.h.1.ln_2.weight has dtype I64, expected one of F32, F16, BF16, F64; "
        "transformer.wpe.weight holds NaN or Inf, first at [0, 1]; "
        "transformer.h.0.attn.c_attn.weight holds NaN or Inf, first at [3, 4]"
    )
    assert refusal(write_safetensors_checkpoint(tmp_path, CONFIG, weights)) == f"{tmp_path}: {expected}"


@pytest.mark.parametrize("layout", WRITERS)
def test_reading_one_damaged_tensor_names_all(tmp_path: Path, layout: str) -> None:
    weights = {name: values.copy() for name, values in WEIGHTS.items()}
    weights["h.0.ln_1.bias"][0] = np.nan
    weights["ln_f.weight"][5] = -np.inf
    tensors = read_checkpoint(WRITERS[layout](tmp_path, CONFIG, weights)).tensors
    np.testing.assert_array_equal(tensors["wte.weight"], WEIGHTS["wte.weight"])
    with pytest.raises(CheckpointError, match=r"2 faults .*h\.?0.ln_1.b.* first at \[0\].*ln_f.* first at \[5\]$"):
        tensors["ln_f.weight"]


def test_damaged_and_not_finite_tensors_of_openai_are_named_at_once(tmp_path: Path) -> None:
    weights = {name: values.copy() for name, values in WEIGHTS.items()}
    weights["wpe.weight"][1, 1] = np.nan
    folder = write_openai_checkpoint(tmp_path, CONFIG, weights)
    data = folder / "model.ckpt.data-00000-of-00001"
    raw = bytearray(data.read_bytes())
    raw[0] ^= 1  # the bundle is sorted by name: model/h0/attn/c_attn/b comes first
    data.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder).tensors["h.0.attn.c_attn.bias"]
    assert re.search(
        r": 2 faults in its tensors: model/wpe holds NaN or Inf, first at \[1, 1\]; "
        r"model/h0/attn/c_attn/b is damaged: checksum 0x.{8} of its bytes, 0x.{8} recorded; "
        r"copy model.ckpt.data-00000-of-00001 again$",
        str(caught.value),
    )


def test_a_truncated_openai_checkpoint_names_what_is_cut_off(tmp_path: Path) -> None:
    folder = write_openai_checkpoint(tmp_path, CONFIG, WEIGHTS)
    data = folder / "model.ckpt.data-00000-of-00001"
    os.truncate(data, data.stat().st_size - 1)
    assert re.search(
        r": 1 fault in its tensors: model/wte ends at byte (\d+) of .*, which has \d+ bytes$", refusal(folder)
    )


def test_a_long_list_is_cut_and_counted(tmp_path: Path) -> None:
    folder = write_safetensors_checkpoint(
        tmp_path, CONFIG, {"wte.weight": WEIGHTS["wte.weight"], **dict.fromkeys("ab", WEIGHTS["ln_f.bias"])}
    )
    message = refusal(folder)
    assert message.startswith(f"{tmp_path}: 29 faults in its tensors: transformer.wpe.weight is missing; ")
    assert message.endswith("; and 9 more")


def test_a_layer_count_without_tensors_is_refused_at_once(tmp_path: Path) -> None:
    folder = write_safetensors_checkpoint(tmp_path, CONFIG, WEIGHTS, n_layer=2_000_000_000)
    assert refusal(folder).endswith("its config says n_layer 2000000000, it holds 28 tensors")


def test_a_vocabulary_that_contradicts_the_config_is_refused(tmp_path: Path) -> None:
    folder = write_safetensors_checkpoint(tmp_path, CONFIG, WEIGHTS, vocab_size=132)
    assert refusal(folder).endswith("1 fault in its tensors: transformer.wte.weight is [131, 32], expected [132, 32]")


# --- config.json -------------------------------------------------------------------------------------------------


def config_of(folder: Path, **fields: object) -> GPT2Config:
    return read_checkpoint(write_safetensors_checkpoint(folder, CONFIG, WEIGHTS, **fields)).config  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("gelu_new", "gelu_new"),
        ("gelu_fast", "gelu_new"),
        ("gelu_pytorch_tanh", "gelu_new"),
        ("gelu", "gelu"),
        ("relu", "relu"),
        ("silu", "silu"),
        ("swish", "silu"),
    ],
)
def test_activations(tmp_path: Path, theirs: str, ours: str) -> None:
    assert config_of(tmp_path, activation_function=theirs).activation == ours


def test_fields_that_are_supported(tmp_path: Path) -> None:
    config = replace(
        CONFIG,
        n_inner=48,
        eos_token_id=5,
        activation="relu",
        layer_norm_epsilon=1e-6,
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
    )
    folder = write_safetensors_checkpoint(tmp_path, config, tiny_weights(config), reorder_and_upcast_attn=True)
    assert read_checkpoint(folder).config == config


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write_safetensors_checkpoint(tmp_path, CONFIG, WEIGHTS)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 131}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    assert read_checkpoint(folder).config == CONFIG  # n_inner is 4 n_embd, eos the last id of a short vocabulary


def test_other_names_of_the_sizes(tmp_path: Path) -> None:
    folder = write_safetensors_checkpoint(tmp_path, CONFIG, WEIGHTS)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 131, "n_embd": 32, **sizes}))
    assert read_checkpoint(folder).config == CONFIG


def test_n_positions_goes_before_n_ctx(tmp_path: Path) -> None:
    assert config_of(tmp_path / "both", n_ctx=1024).n_ctx == 64
    folder = write_safetensors_checkpoint(tmp_path / "one", CONFIG, WEIGHTS)
    fields = hugging_face_config(CONFIG)
    del fields["n_positions"]
    (folder / "config.json").write_text(json.dumps(fields | {"n_ctx": 64}))
    assert read_checkpoint(folder).config == CONFIG


def test_a_list_of_one_end_token(tmp_path: Path) -> None:
    assert config_of(tmp_path, eos_token_id=[3]).eos_token_id == 3


CONFIG_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "add_cross_attention": ({"add_cross_attention": True}, "add_cross_attention is True, not supported"),
    "is_encoder_decoder": ({"is_encoder_decoder": True}, "is_encoder_decoder is True, not supported"),
    "pruned_heads": ({"pruned_heads": {"0": [1]}}, r"pruned_heads is \{'0': \[1\]\}, not supported"),
    "quantization_config": ({"quantization_config": {"bits": 4}}, "quantization_config is .*, not supported"),
    "auto_map": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map is .*, not supported"),
    "is_causal": ({"is_causal": False}, "is_causal is False, expected true"),
    "model_type": ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo', expected 'gpt2'"),
    "no model_type": ({"model_type": None}, "model_type is None, expected 'gpt2'"),
    "activation": ({"activation_function": "mish"}, "activation_function is 'mish', expected one of gelu_new, "),
    "n_layer": ({"n_layer": 2.5}, "n_layer is 2.5, expected a whole number above 0"),
    "n_inner": ({"n_inner": 0}, "n_inner is 0, expected a whole number above 0"),
    "true": ({"n_head": True}, "n_head is True, expected a whole number above 0"),
    "huge": ({"n_embd": 10**4000}, "n_embd is 1000.*, expected a whole number above 0"),
    "aliases": ({"hidden_size": 64}, "n_embd is 32 but hidden_size is 64"),
    "heads": ({"n_head": 3}, "n_embd 32 is no multiple of n_head 3"),
    "epsilon": ({"layer_norm_epsilon": 10**400}, "layer_norm_epsilon is 1000"),
    "no epsilon": ({"layer_norm_epsilon": None}, "layer_norm_epsilon is None, expected a number"),
    "scale": ({"scale_attn_weights": 1}, "scale_attn_weights is 1, expected true or false"),
    "tie": ({"tie_word_embeddings": None}, "tie_word_embeddings is None, expected"),
    "eos": ({"eos_token_id": 50256}, "eos_token_id is 50256, expected one of the 131 ids"),
    "two eos": ({"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\], expected a number"),
    "no eos": ({"eos_token_id": None}, "eos_token_id is None, expected a number"),
    "two": ({"pruned_heads": {"0": [1]}, "n_head": "2"}, "pruned_heads is .*, not supported; n_head is '2', expected"),
}


@pytest.mark.parametrize("name", CONFIG_FAULTS)
def test_config_fields_that_are_refused(tmp_path: Path, name: str) -> None:
    fields, expected = CONFIG_FAULTS[name]
    message = refusal(write_safetensors_checkpoint(tmp_path, CONFIG, WEIGHTS, **fields))
    assert re.search(f"config.json: .*{expected}", message)


@pytest.mark.parametrize("field", ["n_layer", "n_head", "n_embd", "n_positions", "vocab_size"])
def test_a_size_that_is_missing_is_refused(tmp_path: Path, field: str) -> None:
    folder = write_safetensors_checkpoint(tmp_path, CONFIG, WEIGHTS)
    fields = hugging_face_config(CONFIG)
    del fields[field]
    (folder / "config.json").write_text(json.dumps(fields))
    assert refusal(folder).endswith(f"config.json: {field} is missing")


# --- OpenAI's layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["run7", "/home/me/run7", "C:\\\\models\\\\run7"])
def test_the_checkpoint_file_names_the_prefix(tmp_path: Path, written: str) -> None:
    folder = write_openai_checkpoint(tmp_path, CONFIG, WEIGHTS, prefix="run7")
    (folder / "old.index").write_bytes(b"")
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{written}"\nall_model_checkpoint_paths: "old"\n')
    assert_same_tensors(read_checkpoint(folder), WEIGHTS)


def test_without_a_checkpoint_file_the_only_index_counts(tmp_path: Path) -> None:
    folder = write_openai_checkpoint(tmp_path, CONFIG, WEIGHTS, prefix="run7")
    (folder / "checkpoint").unlink()
    assert_same_tensors(read_checkpoint(folder), WEIGHTS)
    (folder / "old.index").write_bytes(b"")
    assert "holds 2 checkpoints (old.index, run7.index ...) and no file named checkpoint" in refusal(folder)


@pytest.mark.parametrize("pointer", ["", 'model_checkpoint_path: ""', 'model_checkpoint_path: "a/"', "\0", '"'])
def test_a_checkpoint_file_that_names_nothing_is_refused(tmp_path: Path, pointer: str) -> None:
    folder = write_openai_checkpoint(tmp_path, CONFIG, WEIGHTS)
    (folder / "checkpoint").write_text(pointer)
    assert 'checkpoint has no line model_checkpoint_path: "..." that ends in a file name' in refusal(folder)


def test_a_checkpoint_file_that_names_a_missing_index_is_refused(tmp_path: Path) -> None:
    folder = write_openai_checkpoint(tmp_path, CONFIG, WEIGHTS)
    (folder / "checkpoint").write_text('model_checkpoint_path: "other"')
    assert "other.index cannot be read: No such file" in refusal(folder)


def test_tensors_that_gpt2_does_not_have_are_refused(tmp_path: Path) -> None:
    folder = write_openai_checkpoint(tmp_path, CONFIG, WEIGHTS)
    tensors = {openai_name(name): values for name, values in WEIGHTS.items()}
    write_bundle(
        folder / "model.ckpt", {**tensors, "global_step": np.zeros(1, np.int64), "lm_head.weight": tensors["model/wte"]}
    )
    message = refusal(folder)
    assert message.endswith(
        "2 faults in its tensors: global_step is no tensor of this GPT-2; lm_head.weight is no tensor of this GPT-2"
    )


@pytest.mark.parametrize(
    ("hparams", "expected"),
    [
        ({}, "n_vocab is missing; n_ctx is missing; n_embd is missing; n_head is missing; n_layer is missing"),
        (FIVE_SIZES | {"n_head": 3}, "n_embd 32 is no multiple of n_head 3"),
        (FIVE_SIZES | {"n_ctx": "64"}, "n_ctx is '64', expected a whole number above 0"),
        (FIVE_SIZES | {"rotary": True}, r"fields \['rotary'\] are not supported"),
        ([], "is not a JSON object"),
        ("{", "is not valid JSON"),
    ],
)
def test_hparams_that_are_refused(tmp_path: Path, hparams: object, expected: str) -> None:
    folder = write_openai_checkpoint(tmp_path, CONFIG, WEIGHTS)
    (folder / "hparams.json").write_text(hparams if isinstance(hparams, str) else json.dumps(hparams))
    assert re.search(f"hparams.json:? .*{expected}", refusal(folder))


# --- no checkpoint -----------------------------------------------------------------------------------------------


def test_a_folder_without_checkpoint_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    assert refusal(tmp_path).endswith("(nanoGPT), and for *.bin of llm.c; found nothing")
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("")
    message = refusal(tmp_path)
    assert "looked for hparams.json with *.index (OpenAI), for config.json with model.safetensors or " in message
    assert message.endswith("found 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, 5.txt, 6.txt, 7.txt and 2 more")


def test_a_path_where_nothing_lies_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none").endswith("none is no checkpoint folder: No such file or directory")


def test_a_file_that_is_no_checkpoint_by_itself_is_refused(tmp_path: Path) -> None:
    folder = write_safetensors_checkpoint(tmp_path, CONFIG, WEIGHTS)
    assert "model.safetensors is no checkpoint that is one file" in refusal(folder / "model.safetensors")
    assert refusal(folder / "config.json").endswith("of any other layout, name the folder")


def test_two_checkpoints_in_one_folder_are_refused(tmp_path: Path) -> None:
    write_openai_checkpoint(tmp_path, CONFIG, WEIGHTS)
    write_safetensors_checkpoint(tmp_path, CONFIG, WEIGHTS)
    assert "holds two checkpoints, openai-tensorflow and safetensors: move one" in refusal(tmp_path)


# --- mutations: parsed or refused, nothing else ------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
config_keys = sorted({*hugging_face_config(CONFIG), "n_ctx", "hidden_size", "pruned_heads", "auto_map", "is_causal"})


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(fields=st.dictionaries(st.sampled_from(config_keys) | st.text(max_size=3), json_values, max_size=4))
def test_mutated_configs(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]) -> None:
    folder = tmp_path_factory.getbasetemp() / "mutated"
    folder.mkdir(exist_ok=True)
    save_file({"wte.weight": WEIGHTS["wte.weight"]}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hugging_face_config(CONFIG) | fields))
    refusal(folder)  # whatever the config says, tensors are missing
