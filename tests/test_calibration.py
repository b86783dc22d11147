"""Calibration: the model that it runs, the function that its scaling leaves alone, what it stores, what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from export import calibration, calibration_text
from export.calibration import LEAST_ACTIVATION, calibrate
from export.calibration_text import SEQUENCE_TOKENS, own_text, text_of_file
from export.checkpoint import canonical_shapes
from export.reference import ACTIVATIONS, reference_logits
from export.tokenizer_files import build_tokenizer
from quantization.blocks import Blocks
from quantization.drift import made_up_for
from quantization.int8 import Int8Columns
from quantization.recipes import (
    INT4,
    MATRIX_BLOCK_SIZES,
    TABLE_BLOCK_SIZES,
    WEIGHTS_ONLY,
    Quantized,
    SplitMatrix,
    TokenTable,
    dequantized,
)
from runtime.config import Activation, GPT2Config
from runtime.errors import QuantizationError, RequestError
from runtime.text_generator import TextGenerator
from tests.outliers import CHANNELS, plant_activation_outliers
from tests.tiny import tiny_config, tiny_weights

SAME_FUNCTION = 1e-5
"""Between logits before and after all scaling, which have a spread of about 0.6. Measured: 2e-6."""

SAME_INPUTS = 1e-4
"""Between sums of squared inputs in float32 and those of the oracle, as a share of the largest. Measured: 2e-6."""

MADE_UP = 0.85
"""Of the logits' squared error, what is left where layers make up for each other. Measured: 0.63 to 0.73."""

UNTIED = replace(tiny_config(), tie_word_embeddings=False)

Float32Array = NDArray[np.float32]


def token_ids(config: GPT2Config, batch: int = 3, length: int = 20) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, config.n_vocab, (batch, length))


class Unrounded:
    """Takes the place of rounding, to see what goes into it: the scaled matrices, and X^T X of their inputs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hessians: list[Float32Array] = []
        monkeypatch.setattr(calibration, "quantize_matrix", self.quantize)
        monkeypatch.setattr(calibration, "quantize_table", self.quantize)
        monkeypatch.setattr(calibration, "dequantized", self.whole)

    def quantize(self, weight: Float32Array, _precision: Quantized, hessian: Float32Array | None = None) -> Any:
        if hessian is not None:
            self.hessians.append(hessian)
        return weight

    def whole(self, result: Any) -> Any:
        """A tensor as the embedding and the products see it, its parts put together again."""
        match result:
            case SplitMatrix(quantized, kept):
                return np.concatenate([quantized, kept])
            case TokenTable(blocks, None):
                return blocks
            case TokenTable(blocks, column_scale):
                return blocks * column_scale
            case _:
                return result

    def tensors(self, results: Mapping[str, Any]) -> dict[str, Float32Array]:
        """For the oracle: the head's table as the head sees it."""
        return {
            name: result.blocks if isinstance(result, TokenTable) else self.whole(result)
            for name, result in results.items()
        }


def test_every_tensor_gets_its_place() -> None:
    for config in (tiny_config(), UNTIED):
        for precision in get_args(Quantized):
            results = calibrate(config, tiny_weights(config), token_ids(config), precision)
            assert set(results) == set(canonical_shapes(config))
            matrix = Blocks if precision in MATRIX_BLOCK_SIZES else Int8Columns
            table = TokenTable if precision in TABLE_BLOCK_SIZES else np.ndarray
            for name, shape in canonical_shapes(config).items():
                expected = table if name in ("wte.weight", "lm_head.weight") else matrix
                quantized = len(shape) == 2 and name != "wpe.weight"
                assert isinstance(results[name], expected if quantized else np.ndarray), name


# The function


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("precision", sorted(set(get_args(Quantized)) - set(WEIGHTS_ONLY)))
def test_scaling_leaves_the_function_alone(
    monkeypatch: pytest.MonkeyPatch, activation: Activation, precision: Quantized
) -> None:
    config = replace(UNTIED, activation=activation)
    weights, ids = tiny_weights(config), token_ids(config)
    weights["h.0.ln_1.weight"][3] *= 30
    weights["h.1.ln_2.bias"][5] *= 30
    unrounded = Unrounded(monkeypatch)
    scaled = unrounded.tensors(calibrate(config, weights, ids, precision))
    assert not np.allclose(scaled["h.0.ln_1.weight"], weights["h.0.ln_1.weight"])
    before, after = (reference_logits(config, tensors, list(ids)) for tensors in (weights, scaled))
    np.testing.assert_allclose(np.concatenate(after), np.concatenate(before), rtol=0, atol=SAME_FUNCTION)


@pytest.mark.parametrize("precision", sorted(set(get_args(Quantized)) - set(WEIGHTS_ONLY)))
def test_no_mean_is_rounded(monkeypatch: pytest.MonkeyPatch, precision: Quantized) -> None:
    """Of the inputs of each matrix but the second of the two behind the activation."""
    config, weights, means = replace(UNTIED, n_layer=1), tiny_weights(UNTIED), list[Float32Array]()
    weights["h.0.ln_1.bias"] += 3
    weights["h.0.ln_2.bias"] += 3
    weights["h.0.attn.c_attn.bias"] += 3
    hessian = calibration._hessian

    def watched(inputs: Float32Array) -> Float32Array:
        means.append(inputs.reshape(-1, inputs.shape[-1]).mean(axis=0))
        return hessian(inputs)

    monkeypatch.setattr(calibration, "_hessian", watched)
    Unrounded(monkeypatch)  # what a quantized layer hands on has a mean of its own
    calibrate(config, weights, token_ids(config), precision)
    c_attn, attention_c_proj, c_fc, *_ = means
    for mean in (c_attn, attention_c_proj, c_fc):
        assert np.abs(mean).max() <= 1e-5


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_outliers_are_set_apart_and_change_nothing(monkeypatch: pytest.MonkeyPatch, precision: Quantized) -> None:
    config, weights = plant_activation_outliers(UNTIED, tiny_weights(UNTIED))
    ids = token_ids(config)
    (before,) = reference_logits(config, weights, [ids[0]])
    unrounded = Unrounded(monkeypatch)
    results = calibrate(config, weights, ids, precision)
    for layer in range(config.n_layer):
        split = results[f"h.{layer}.mlp.c_proj.weight"]
        assert isinstance(split, SplitMatrix)
        assert len(split.kept) == CHANNELS
    (after,) = reference_logits(config, unrounded.tensors(results), [ids[0]])
    assert np.abs(after - before).max() <= 1e-3 * before.std()  # c in float32 is 1e-5 of what it lifts


@pytest.mark.parametrize("change", [{}, {"scale_attn_by_inverse_layer_idx": True}, {"activation": "silu"}], ids=str)
@pytest.mark.parametrize(("precision", "tied", "place"), [("int8", False, -1), ("int4", False, -1), ("int4", True, 0)])
def test_what_it_runs_is_the_model(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], precision: Quantized, tied: bool, place: int
) -> None:
    """Logits are x @ head.T, so head @ X^T X @ head.T must be the oracle's logits^T logits.

    The head comes last, but for the table of a tied model at 4 bits, which comes first, behind a run of its own.
    """
    config = replace(UNTIED, tie_word_embeddings=tied, **change)
    weights, ids = tiny_weights(config), token_ids(config)
    unrounded = Unrounded(monkeypatch)
    name = "wte.weight" if tied else "lm_head.weight"
    head = unrounded.tensors(calibrate(config, weights, ids, precision))[name].astype(np.float64)
    logits = np.concatenate(reference_logits(config, weights, list(ids))).astype(np.float64)
    expected = logits.T @ logits
    actual = head @ unrounded.hessians[place] @ head.T
    assert np.abs(actual - expected).max() <= SAME_INPUTS * np.abs(expected).max()


@pytest.mark.parametrize("activation", get_args(Activation))
def test_no_activation_is_below_its_least(activation: Activation) -> None:
    x = np.linspace(-20, 20, 100_001)
    assert ACTIVATIONS[activation](x).min() >= LEAST_ACTIVATION[activation]


@pytest.mark.parametrize("length", [1, 2, 64])
@pytest.mark.parametrize("precision", get_args(Quantized))
def test_short_texts_and_a_model_of_zeros_will_do(precision: Quantized, length: int) -> None:
    config = tiny_config()
    for weights in (tiny_weights(config), {name: np.zeros_like(w) for name, w in tiny_weights(config).items()}):
        results = calibrate(config, weights, token_ids(config, 1, length), precision)
        assert all(np.isfinite(result).all() for result in results.values() if isinstance(result, np.ndarray))


def test_the_weights_are_left_alone() -> None:
    weights = tiny_weights(tiny_config())
    calibrate(tiny_config(), weights, token_ids(tiny_config()), "int8")
    for name, array in tiny_weights(tiny_config()).items():
        np.testing.assert_array_equal(weights[name], array)


@pytest.mark.parametrize(("precision", "tied", "runs"), [("int8", True, 1), ("int4", True, 2), ("int4", False, 1)])
def test_progress_ends_with_every_matrix_of_the_layers(precision: Quantized, tied: bool, runs: int) -> None:
    config, seen = tiny_config() if tied else UNTIED, list[tuple[int, int]]()
    calibrate(config, tiny_weights(config), token_ids(config), precision, lambda *done: seen.append(done))
    shapes = canonical_shapes(config)
    total = sum(int(np.prod(shapes[name])) for name in shapes if name.startswith("h.") and len(shapes[name]) == 2)
    assert seen[-1] == (runs * total, runs * total)
    assert len(seen) == runs * 4 * config.n_layer


@pytest.mark.parametrize("config", [tiny_config(), UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("precision", INT4)
def test_at_4_bits_layers_make_up_for_each_other(
    monkeypatch: pytest.MonkeyPatch, config: GPT2Config, precision: Quantized
) -> None:
    """On tokens of the same kind: the oracle's logits are closer to the model's than without."""
    weights, ids = tiny_weights(config), token_ids(config, 24, 40)
    others = list(np.random.default_rng(1).integers(0, config.n_vocab, (4, 40)))
    before = np.concatenate(reference_logits(config, weights, others))

    def error() -> float:
        results = calibrate(config, weights, ids, precision)
        tensors = {name: dequantized(result) for name, result in results.items()}
        head = results["wte.weight" if config.tie_word_embeddings else "lm_head.weight"]
        assert isinstance(head, TokenTable)
        if head.column_scale is not None:  # it is the embedding's; the head has it in the last layer norm
            for name in ("ln_f.weight", "ln_f.bias"):
                tensors[name] = tensors[name] / head.column_scale
        return float(np.square(np.concatenate(reference_logits(config, tensors, others)) - before).mean())

    following = error()
    monkeypatch.setattr(calibration, "INT4", ())
    assert following <= MADE_UP * error()


def test_branches_make_up_for_what_the_sum_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    weights, ids, missing = tiny_weights(config), token_ids(config), list[Float32Array | None]()

    def watched(weight: Float32Array, *inputs: Any) -> Float32Array:
        missing.append(inputs[-1])
        return made_up_for(weight, *inputs)

    monkeypatch.setattr(calibration, "made_up_for", watched)
    results = calibrate(config, weights, ids, "int4")
    assert [each is not None for each in missing] == [False, True, False, True] * config.n_layer
    lost = (weights["wte.weight"] - dequantized(results["wte.weight"]))[ids]  # all that the first branch can know of
    assert missing[1] is not None
    np.testing.assert_allclose(missing[1], lost.reshape(missing[1].shape), rtol=0, atol=1e-6)


# Refusals


@pytest.mark.parametrize("name", ["wte.weight", "wpe.weight", "h.1.ln_2.bias", "h.0.attn.c_attn.weight", "ln_f.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_refused_by_name(name: str, value: float) -> None:
    config, weights = tiny_config(), tiny_weights(tiny_config())
    weights[name].flat[-1] = value
    with pytest.raises(
        QuantizationError, match=rf"^{name} holds a value that is not finite; the checkpoint is damaged"
    ):
        calibrate(config, weights, token_ids(config), "int4")


@pytest.mark.parametrize(
    "overflowing", [("mlp.c_fc", "mlp.c_proj"), ("attn.c_attn", "attn.c_proj")], ids=["two layers", "attention"]
)
def test_a_model_that_overflows_is_refused(overflowing: tuple[str, ...]) -> None:
    config, weights = tiny_config(), tiny_weights(tiny_config())
    for name in overflowing:
        weights[f"h.0.{name}.weight"] *= np.float32(1e30)
    with pytest.raises(QuantizationError, match="inputs that are not finite"):
        calibrate(config, weights, token_ids(config), "int8")


# The text


def test_the_model_writes_the_same_text_again(tiny_int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = TextGenerator.load(tiny_int8)
    steps: list[tuple[int, int]] = []
    ids = own_text(generator.decoder, 5, lambda done, total: steps.append((done, total)))
    config = generator.config
    assert ids.shape == (5, min(SEQUENCE_TOKENS, config.n_ctx))
    assert (ids[:, 0] == config.eos_token_id).all()
    assert 0 <= ids.min() <= ids.max() < config.n_vocab
    assert len({tuple(row) for row in ids.tolist()}) == 5
    for together in (1, 2):  # however many rows are written at a time
        monkeypatch.setattr(calibration_text, "ROWS_TOGETHER", together)
        np.testing.assert_array_equal(own_text(generator.decoder, 5, lambda *done: steps.append(done)), ids)
        assert steps[-1] == (5 * (config.n_ctx - 1), 5 * (config.n_ctx - 1))


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_a_file_gives_whole_rows_from_its_beginning(tiny_checkpoint: Path, tmp_path: Path, rows: int) -> None:
    config = replace(tiny_config(), n_vocab=257)
    text = "".join(chr(ord("a") + index % 26) for index in range(rows * config.n_ctx + 7))
    (tmp_path / "text.txt").write_text(text)
    ids = text_of_file(tmp_path / "text.txt", build_tokenizer(tiny_checkpoint, n_vocab=257), config, 4)
    assert ids.shape == (min(rows, 4), config.n_ctx)
    assert ids.reshape(-1).tolist() == [ord(character) for character in text[: ids.size]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"short", "5 tokens, expected at least 64; name a longer text"),
        (b"caf\xe9" * 99, "cannot be read as UTF-8 text"),
        (None, "cannot be read as UTF-8 text"),
    ],
)
def test_a_file_that_is_no_text_is_refused_in_one_line(
    tiny_checkpoint: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match=message) as caught:
        text_of_file(path, build_tokenizer(tiny_checkpoint, n_vocab=257), replace(tiny_config(), n_vocab=257), 4)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
