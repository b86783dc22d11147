"""Queries that carry the scale of the scores: which columns, in every form that a matrix may have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from export.queries import ScaledQueries
from quantization.recipes import SplitMatrix, Tensor, dequantized, quantize_matrix, times_columns

from .tiny import tiny_config, tiny_weights

WEIGHT = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
FACTORS = np.array([1 / 8, 1, 4], np.float32).repeat(16)
FORMS: dict[str, Tensor] = {
    "float32": WEIGHT,
    "int8": quantize_matrix(WEIGHT, "int8"),
    "int4": quantize_matrix(WEIGHT, "int4"),
    "split": SplitMatrix(quantize_matrix(WEIGHT[:60], "int8"), WEIGHT[60:]),
    "split int4": SplitMatrix(quantize_matrix(WEIGHT[:60], "int4"), WEIGHT[60:]),
}


@pytest.mark.parametrize("form", FORMS)
def test_columns_are_multiplied_and_nothing_is_rounded(form: str) -> None:
    product = times_columns(FORMS[form], FACTORS)
    assert type(product) is type(FORMS[form])
    np.testing.assert_array_equal(dequantized(product), dequantized(FORMS[form]) * FACTORS)


def test_queries_alone_are_scaled_as_their_layer_says() -> None:
    config = replace(tiny_config(), scale_attn_by_inverse_layer_idx=True)
    weights = tiny_weights(config)
    scaled = ScaledQueries(config, weights)
    assert list(scaled) == list(weights) and len(scaled) == len(weights)
    for name, weight in weights.items():
        result = scaled[name]
        assert isinstance(result, np.ndarray)
        expected = weight.copy()
        if ".c_attn." in name:
            layer = int(name.split(".")[1])
            expected[..., : config.n_embd] *= np.float32(config.head_dim**-0.5 / (layer + 1))
        np.testing.assert_array_equal(result, expected)
