"""Layouts that say less than Hugging Face's: what is recognised, turned, filled in, dropped and refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.checkpoint import Checkpoint, fit_vocabulary, read_checkpoint
from export.tokenizer_files import END_OF_TEXT
from runtime.config import OFFICIAL_SIZES
from runtime.errors import CheckpointError
from tests.tiny import Weights, tiny_config, tiny_weights, write_safetensors_checkpoint
from tests.write_layouts import (
    need_torch,
    state_dict,
    write_bin_checkpoint,
    write_llmc_checkpoint,
    write_nanogpt_checkpoint,
)

CONFIG = tiny_config()
ERF = replace(CONFIG, activation="gelu")
WEIGHTS = tiny_weights(CONFIG)
NO_BIASES = {name: values for name, values in WEIGHTS.items() if not name.endswith(".bias")}


def ids(n_tokens: int) -> dict[str, int]:
    """A vocabulary whose <|endoftext|> is its first token."""
    return {END_OF_TEXT: 0} | {str(i): i for i in range(1, n_tokens)}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_holds(checkpoint: Checkpoint, expected: Weights) -> None:
    assert list(checkpoint.tensors) == list(expected)
    for name, values in expected.items():
        assert checkpoint.tensors[name].flags.c_contiguous
        np.testing.assert_array_equal(checkpoint.tensors[name], values)


# --- Hugging Face's .bin -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shards", "layout"), [(1, "hugging-face-bin"), (3, "hugging-face-bin-sharded")])
def test_bin_files_hold_the_same_tensors(tmp_path: Path, shards: int, layout: str) -> None:
    checkpoint = read_checkpoint(write_bin_checkpoint(tmp_path, CONFIG, WEIGHTS, shards))
    assert checkpoint.layout == layout
    assert checkpoint.config == CONFIG
    assert_holds(checkpoint, WEIGHTS)


def test_safetensors_go_before_a_bin_beside_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    write_safetensors_checkpoint(tmp_path, CONFIG, WEIGHTS)
    assert read_checkpoint(tmp_path).layout == "safetensors"


def test_a_shard_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = write_bin_checkpoint(tmp_path, CONFIG, WEIGHTS, 2)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("pytorch_model-00002", "../pytorch_model-00002"))
    assert "expected a file beside the index" in refusal(folder)


def test_all_damaged_shards_are_named(tmp_path: Path) -> None:
    folder = write_bin_checkpoint(tmp_path, CONFIG, WEIGHTS, 3)
    (folder / "pytorch_model-00001-of-00003.bin").unlink()
    (folder / "pytorch_model-00003-of-00003.bin").write_bytes(b"<html>")
    message = refusal(folder)
    assert "pytorch_model-00001-of-00003.bin cannot be read: No such file" in message
    assert "pytorch_model-00003-of-00003.bin cannot be read as tensors" in message


# --- nanoGPT -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["", "_orig_mod.", "module.", "_orig_mod.module."])
def test_nanogpt_is_read_with_any_wrapper(tmp_path: Path, wrapper: str) -> None:
    checkpoint = read_checkpoint(write_nanogpt_checkpoint(tmp_path, CONFIG, WEIGHTS, wrapper=wrapper))
    assert checkpoint.layout == "nanogpt"
    assert checkpoint.config == ERF
    assert checkpoint.source_config["dropout"] == 0.0
    assert_holds(checkpoint, WEIGHTS)


def test_without_biases_they_are_zero(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_nanogpt_checkpoint(tmp_path, CONFIG, NO_BIASES))
    assert_holds(checkpoint, {name: NO_BIASES.get(name, np.zeros_like(values)) for name, values in WEIGHTS.items()})


def test_biases_that_the_arguments_deny_are_refused(tmp_path: Path) -> None:
    message = refusal(write_nanogpt_checkpoint(tmp_path, CONFIG, WEIGHTS, bias=False))
    assert "13 faults in its tensors: transformer.h.0.ln_1.bias is no tensor of this GPT-2" in message


def test_mask_buffers_of_old_versions_are_dropped(tmp_path: Path) -> None:
    buffers: Weights = {**WEIGHTS, "h.0.attn.bias": np.tri(64, dtype=np.float32)[None, None]}
    assert_holds(read_checkpoint(write_nanogpt_checkpoint(tmp_path, CONFIG, buffers)), WEIGHTS)


def test_the_file_can_be_named(tmp_path: Path) -> None:
    folder = write_nanogpt_checkpoint(tmp_path / "out-books", CONFIG, WEIGHTS)
    checkpoint = read_checkpoint(folder / "ckpt.pt")
    assert (checkpoint.folder, checkpoint.name) == (folder, "out-books")
    shutil.move(folder / "ckpt.pt", folder / "step5000.pt")
    assert read_checkpoint(folder / "step5000.pt").name == "step5000"
    assert "found step5000.pt" in refusal(folder)


def test_misshaped_matrices_are_named_as_they_are_stored(tmp_path: Path) -> None:
    weights: Weights = {**WEIGHTS, "h.1.mlp.c_fc.weight": np.zeros((32, 127), np.float32)}
    message = refusal(write_nanogpt_checkpoint(tmp_path, CONFIG, weights))
    assert message.endswith("transformer.h.1.mlp.c_fc.weight is [127, 32], expected [128, 32]")


def test_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    weights: Weights = {**WEIGHTS, "lm_head.weight": WEIGHTS["wte.weight"] + 1}
    message = refusal(write_nanogpt_checkpoint(tmp_path, CONFIG, weights))
    assert message.endswith("lm_head.weight differs from _orig_mod.transformer.wte.weight, but nanogpt ties them")


@pytest.mark.parametrize(
    ("model_args", "expected"),
    [
        ({"n_layer": "2"}, "n_layer is '2', expected a whole number above 0"),
        ({"block_size": 0}, "block_size is 0, expected a whole number above 0"),
        ({"bias": None}, "bias is None, expected true or false"),
        ({"rope": True}, "fields ['rope'] of model_args are not supported"),
        ({"n_head": 3}, "n_embd 32 is no multiple of n_head 3"),
        ({"n_layer": 1 << 30}, "its config says n_layer 1073741824, it holds 29 tensors"),
    ],
)
def test_model_args_that_are_refused(tmp_path: Path, model_args: dict[str, Any], expected: str) -> None:
    assert expected in refusal(write_nanogpt_checkpoint(tmp_path, CONFIG, WEIGHTS, **model_args))


def test_a_pt_file_of_something_else_is_refused(tmp_path: Path) -> None:
    need_torch().save(state_dict(WEIGHTS), tmp_path / "ckpt.pt")
    assert refusal(tmp_path).endswith("is no checkpoint of nanoGPT: it has no model and model_args")


def test_a_tensor_with_and_without_a_wrapper_is_refused(tmp_path: Path) -> None:
    torch = need_torch()
    folder = write_nanogpt_checkpoint(tmp_path, CONFIG, WEIGHTS)
    content = torch.load(folder / "ckpt.pt", weights_only=True)
    content["model"]["lm_head.weight"] = torch.zeros(131, 32)
    torch.save(content, folder / "ckpt.pt")
    assert "ckpt.pt holds a tensor twice, with and without _orig_mod. or module." in refusal(folder)


# --- vocabularies --------------------------------------------------------------------------------------------------


def test_padded_rows_are_dropped_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = read_checkpoint(write_nanogpt_checkpoint(tmp_path, CONFIG, WEIGHTS, padded_vocab=192))
    assert (stored.config.n_vocab, stored.config.eos_token_id) == (192, 191)
    checkpoint = fit_vocabulary(stored, ids(131))
    assert checkpoint.config == replace(ERF, eos_token_id=0)
    assert_holds(checkpoint, WEIGHTS)
    assert caplog.messages == [
        f"{tmp_path}: the last 61 of 192 rows of the embedding are padding, and dropped: the tokenizer has 131 tokens"
    ]


def test_the_end_of_text_of_nanogpt_and_llmc_is_the_tokenizers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = fit_vocabulary(read_checkpoint(write_llmc_checkpoint(tmp_path, CONFIG, WEIGHTS)), ids(131))
    assert checkpoint.config == replace(CONFIG, eos_token_id=0)
    assert_holds(checkpoint, WEIGHTS)
    assert not caplog.messages


def test_hugging_face_keeps_the_vocabulary_that_it_declares(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_safetensors_checkpoint(tmp_path, CONFIG, WEIGHTS))
    assert fit_vocabulary(checkpoint, ids(100)) is checkpoint


def test_a_tokenizer_that_is_far_too_small_is_refused(tmp_path: Path) -> None:
    config = replace(CONFIG, n_vocab=1200)
    checkpoint = read_checkpoint(write_llmc_checkpoint(tmp_path, config, tiny_weights(config)))
    with pytest.raises(
        CheckpointError, match=r"has 1200 rows, the tokenizer 176 tokens, more .* with --tokenizer DIR$"
    ):
        fit_vocabulary(checkpoint, ids(176))
    assert fit_vocabulary(checkpoint, ids(177)).config.n_vocab == 177


def test_gpt2_has_its_end_where_the_padded_vocabulary_does_not_say(tmp_path: Path) -> None:
    config = replace(CONFIG, n_vocab=50257, n_embd=2, n_inner=8, n_layer=1, n_head=1, n_ctx=2, eos_token_id=50256)
    folder = write_nanogpt_checkpoint(tmp_path, config, tiny_weights(config), padded_vocab=50304)
    assert read_checkpoint(folder).config.eos_token_id == OFFICIAL_SIZES["124M"].eos_token_id


# --- two at once ---------------------------------------------------------------------------------------------------


def test_two_layouts_in_one_folder_are_refused(tmp_path: Path) -> None:
    write_llmc_checkpoint(tmp_path, CONFIG, WEIGHTS)
    write_nanogpt_checkpoint(tmp_path, CONFIG, WEIGHTS)
    assert "holds two checkpoints, nanogpt and llm.c: move one" in refusal(tmp_path)
    assert read_checkpoint(tmp_path / "gpt2.bin").layout == "llm.c"
