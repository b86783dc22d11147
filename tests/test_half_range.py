"""Whether float16 holds a model: what is measured, decided and refused, and the head around its mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.half_head import CentredTensors
from export.half_products import as_half
from export.half_range import HalfRange, measure_range
from export.reference import reference_logits
from runtime.errors import QuantizationError
from tests.device_graphs import run_row, write_device_graph
from tests.tiny import tiny_config, tiny_weights

CONFIG = tiny_config()
SEQUENCES = [np.arange(5), np.arange(40, 60)]
SHARED = 100.0
"""What all logits have in common, as GPT-2's do: float16's steps are 1/16 there."""


def test_the_oracle_tells_the_largest_numbers_it_met() -> None:
    measured = measure_range(CONFIG, tiny_weights(CONFIG), SEQUENCES)
    assert measured.tokens == 25
    assert set(measured.peaks) == {"queries keys values", "scores", "branches", "residual", "inner units"}
    weights = tiny_weights(CONFIG)
    weights["h.0.attn.c_attn.bias"][4] -= 1000
    assert measure_range(CONFIG, weights, SEQUENCES).peaks["queries keys values"] == pytest.approx(1000, rel=0.01)


def test_a_residual_near_the_end_of_float16_is_kept_in_float32() -> None:
    assert not measure_range(CONFIG, tiny_weights(CONFIG), SEQUENCES).wide_residual
    weights = tiny_weights(CONFIG)
    weights["wte.weight"][:, 0] += 20_000
    measured = measure_range(CONFIG, weights, SEQUENCES)
    assert measured.wide_residual
    assert "residual 2e+04" in measured.recipe()
    assert measured.recipe().endswith("residual kept in float32")


def test_a_nan_is_no_reason_to_stay_in_float16() -> None:
    assert HalfRange({"residual": float("nan")}, 1).wide_residual


def test_other_numbers_near_the_end_of_float16_are_refused() -> None:
    weights = tiny_weights(CONFIG)
    weights["h.1.mlp.c_fc.bias"][:] += 20_000
    with pytest.raises(QuantizationError, match=r"float16 does not hold .*inner units 2e\+04.*; convert for the CPU"):
        measure_range(CONFIG, weights, SEQUENCES)


def test_a_weight_beyond_float16_is_refused_by_name() -> None:
    with pytest.raises(QuantizationError, match=r"h.0.x holds 7e\+04, expected at most 65504, the largest float16"):
        as_half("h.0.x", np.array([1, -70_000], np.float32))


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_around_its_mean_is_the_same_model(tied: bool) -> None:
    config = tiny_config() if tied else tiny_config().from_dict({**CONFIG.to_dict(), "tie_word_embeddings": False})
    tensors = tiny_weights(config)
    centred = CentredTensors(config, tensors)
    name = "wte.weight" if tied else "lm_head.weight"
    head = centred[name]
    assert head.shape == (config.n_vocab + 1, config.n_embd)
    np.testing.assert_allclose(head[:-1] + head[-1], tensors[name], atol=1e-6)
    np.testing.assert_allclose(head[:-1].mean(axis=0), 0, atol=1e-6)
    embedded = centred["wte.weight"][7] + centred["wpe.weight"][3]
    np.testing.assert_allclose(embedded, tensors["wte.weight"][7] + tensors["wpe.weight"][3], atol=1e-6)


def test_logits_with_much_in_common_stay_apart(tmp_path: Path) -> None:
    """Measured: 0.0023; 0.06 where the rows are not stored around their mean, half of float16's step at 150."""
    weights = tiny_weights(CONFIG)
    weights["ln_f.bias"][0] = 10  # a constant of the last hidden state ...
    weights["wte.weight"][:, 0] += SHARED / 10  # ... times a constant of all rows
    decoder = write_device_graph(tmp_path, "cuda", "fp16", tensors=weights).decoder
    (ids,) = [np.arange(40)]
    (expected,) = reference_logits(CONFIG, weights, [ids])
    assert expected.mean() > SHARED / 2
    difference = run_row(decoder, ids)[0][0] - expected
    difference -= difference.mean(axis=-1, keepdims=True)  # what all logits share changes no choice
    assert np.abs(difference).max() <= 0.01
