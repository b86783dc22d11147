"""Planted outliers are there and change nothing in float; quantized models bear them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from export import reference
from export.checkpoint import read_checkpoint
from export.convert import convert
from export.reference import reference_logits
from quantization.divergence import kl_divergence
from runtime.config import Activation, GPT2Config
from runtime.package import Precision
from runtime.text_generator import TextGenerator

from .conftest import DEMO_CHECKPOINT
from .outliers import CHANNELS, FACTOR, plant_activation_outliers, plant_norm_outliers
from .tiny import tiny_config, tiny_weights, write_safetensors_checkpoint

LARGEST_CHANGE = 1e-3
"""Of a logit, in standard deviations of its position's logits."""

BORNE = 3.0
"""Times its loss without outliers that a quantized model may lose with them. Measured: BORNE8."""

Weights = Mapping[str, NDArray[np.float32]]
Model = tuple[GPT2Config, Weights]
Plant = Callable[[GPT2Config, Weights], Model]


def with_norm_outliers(config: GPT2Config, weights: Weights) -> Model:
    return config, plant_norm_outliers(config, weights)


PLANTS = {"norm": with_norm_outliers, "activation": plant_activation_outliers}


@pytest.fixture(params=list(PLANTS))
def plant(request: pytest.FixtureRequest) -> Plant:
    planted: Plant = PLANTS[request.param]
    return planted


@pytest.fixture(params=["tiny", "demo"])
def model(request: pytest.FixtureRequest) -> Model:
    if request.param == "tiny":
        return tiny_config(), tiny_weights(tiny_config())
    checkpoint = read_checkpoint(DEMO_CHECKPOINT)
    return checkpoint.config, dict(checkpoint.tensors)


def token_ids(config: GPT2Config, length: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, config.n_vocab, length)


def test_the_function_is_the_same(model: Model, plant: Plant) -> None:
    ids = token_ids(model[0], 48)
    (before,) = reference_logits(*model, [ids])
    (after,) = reference_logits(*plant(*model), [ids])
    assert np.abs(after - before).max() <= LARGEST_CHANGE * before.std(axis=-1).min()


@pytest.mark.parametrize("activation", get_args(Activation))
def test_every_activation_can_be_split(activation: Activation) -> None:
    config = replace(tiny_config(), activation=activation)
    weights, ids = tiny_weights(config), token_ids(config, 16)
    (before,) = reference_logits(config, weights, [ids])
    (after,) = reference_logits(*plant_activation_outliers(config, weights), [ids])
    assert np.abs(after - before).max() <= LARGEST_CHANGE * before.std(axis=-1).min()


def test_planting_leaves_the_original_alone(model: Model, plant: Plant) -> None:
    copies = {name: array.copy() for name, array in model[1].items()}
    plant(*model)
    for name, array in model[1].items():
        np.testing.assert_array_equal(array, copies[name])


def test_every_layer_has_large_norm_channels(model: Model) -> None:
    config, weights = model
    planted = plant_norm_outliers(config, weights)
    for layer in range(config.n_layer):
        for norm in ("ln_1", "ln_2"):
            ratio = planted[f"h.{layer}.{norm}.weight"] / weights[f"h.{layer}.{norm}.weight"]
            np.testing.assert_allclose(np.sort(ratio), [1] * (config.n_embd - CHANNELS) + [FACTOR] * CHANNELS)


def test_every_layer_has_large_features_behind_its_activation(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watched in the oracle: the smallest value of a planted feature against the mean magnitude of the others."""
    config, weights = plant_activation_outliers(*model)
    activate, seen = reference.ACTIVATIONS[config.activation], []

    def watched(x: NDArray[np.float64]) -> NDArray[np.float64]:
        seen.append(activate(x))
        return seen[-1]

    monkeypatch.setattr(reference, "ACTIVATIONS", {config.activation: watched})
    reference_logits(config, weights, [token_ids(config, 48)])
    assert len(seen) == config.n_layer
    for features in seen:  # [T, n_inner + CHANNELS]
        assert features[:, -CHANNELS:].min() >= FACTOR * np.abs(features[:, :-CHANNELS]).mean()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_model_bears_outliers(
    request: pytest.FixtureRequest, plant: Plant, tmp_path: Path, precision: Precision
) -> None:
    """It loses about as much as without them, on a text that no part of the conversion saw."""
    original = read_checkpoint(DEMO_CHECKPOINT)
    config, weights = plant(original.config, dict(original.tensors))
    checkpoint = write_safetensors_checkpoint(tmp_path / "model", config, weights, tokenizer_dir=DEMO_CHECKPOINT)
    planted = TextGenerator.load(convert(checkpoint, tmp_path / "package", precision=precision).package)
    plain = TextGenerator.load(request.getfixturevalue(f"demo_{precision}"))
    sampling = replace(plain.default_sampling, seed=3)
    ids = np.array(plain.generate("The", max_new_tokens=400, sampling=sampling).samples[0].ids, np.int64)
    (expected,) = reference_logits(original.config, original.tensors, [ids])
    kl = [
        kl_divergence(expected, np.concatenate([logits.copy() for logits in generator.decoder.logits(ids)])).mean()
        for generator in (plain, planted)
    ]
    assert kl[1] <= BORNE * kl[0]
