"""The same function with outliers in it: what large models have, planted into small ones.

Some channels of a large language model carry values tens of times larger than the others, in the outputs of its layer
norms and behind its activation. One scale for a row of activations then spends its 127 steps on them. These functions
move weights so that such values appear while the float function stays what it was, so all that a quantized package
loses more than before is the outliers' doing.

Sources: Dettmers et al., "LLM.int8()" (2022), section 4, for what outliers are; Wei et al., "Outlier Suppression"
(2022), section 3, for the layer norm's gain and bias as where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from runtime.config import GPT2Config

Float32Array = NDArray[np.float32]

FACTOR = 50
"""How many times larger than the others."""

CHANNELS = 4
"""Outliers of each kind in each layer."""

LINEAR_FROM = 32.0
"""From here on each of GPT-2's activations, gelu in both forms, relu and silu, is the identity to 12 digits."""


def plant_norm_outliers(
    config: GPT2Config, weights: Mapping[str, Float32Array], *, factor: float = FACTOR, channels: int = CHANNELS
) -> dict[str, Float32Array]:
    """Enlarge the same few channels of every ln_1 and ln_2, and undo it in the rows of the matrix behind.

    (factor * normed) @ (row / factor) = normed @ row

    Returns:
        All weights, new arrays where they changed.
    """
    planted = dict(weights)
    chosen = np.random.default_rng(0).choice(config.n_embd, channels, replace=False)
    for layer in range(config.n_layer):
        for norm, matrix in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            for kind in ("weight", "bias"):
                _change(planted, f"h.{layer}.{norm}.{kind}")[chosen] *= np.float32(factor)
            _change(planted, f"h.{layer}.{matrix}.weight")[chosen] /= np.float32(factor)
    return planted


def plant_activation_outliers(
    config: GPT2Config, weights: Mapping[str, Float32Array], *, factor: float = FACTOR, channels: int = CHANNELS
) -> tuple[GPT2Config, dict[str, Float32Array]]:
    """Split a few inner units of every layer in two, one of which is large.

    For each of GPT-2's activations a(z) - a(-z) = z. So a unit that adds a(z) to the others is one that adds a(-z) and
    one that adds z; and z is a(z + c) - c where c lifts z to where the activation is the identity. The lifted unit is
    the outlier: it carries a signal that the model needs. Its -c goes to the bias behind. n_inner grows by `channels`.

    c is `factor` times the typical size of the others' input, which is no smaller than their output, and enough to
    lift every z: a layer norm bounds its output, |normed @ w| <= sqrt(n_embd) * |gain * w| + |bias @ w|.

    Returns:
        The configuration, and all weights.
    """
    planted = dict(weights)
    rng = np.random.default_rng(0)
    for layer in range(config.n_layer):
        gain, shift = (weights[f"h.{layer}.ln_2.{kind}"].astype(np.float64) for kind in ("weight", "bias"))
        fc, fc_bias = (weights[f"h.{layer}.mlp.c_fc.{kind}"] for kind in ("weight", "bias"))
        proj, proj_bias = (weights[f"h.{layer}.mlp.c_proj.{kind}"] for kind in ("weight", "bias"))
        chosen = rng.choice(config.n_inner, channels, replace=False)

        # z of a unit over all tokens: mean, standard deviation as if the channels were independent, and bound
        mean = shift @ fc + fc_bias  # [n_inner]
        deviation = np.sqrt(np.square(gain[:, None] * fc).sum(axis=0))
        typical = np.sqrt(np.square(mean) + np.square(deviation)).mean()
        reach = np.sqrt(config.n_embd) * deviation[chosen] + np.abs(mean[chosen])
        lift = np.maximum(factor * typical, reach + LINEAR_FROM)  # c, [channels]

        lifted_bias = (fc_bias[chosen] + lift).astype(np.float32)
        lift = lifted_bias.astype(np.float64) - fc_bias[chosen]  # what rounding left of it
        flipped, flipped_bias = fc.copy(), fc_bias.copy()
        flipped[:, chosen] *= -1
        flipped_bias[chosen] *= -1
        planted[f"h.{layer}.mlp.c_fc.weight"] = np.concatenate([flipped, fc[:, chosen]], axis=1)
        planted[f"h.{layer}.mlp.c_fc.bias"] = np.concatenate([flipped_bias, lifted_bias])
        planted[f"h.{layer}.mlp.c_proj.weight"] = np.concatenate([proj, proj[chosen]], axis=0)
        planted[f"h.{layer}.mlp.c_proj.bias"] = (proj_bias - lift @ proj[chosen]).astype(np.float32)
    return replace(config, n_inner=config.n_inner + channels), planted


def _change(planted: dict[str, Float32Array], name: str) -> Float32Array:
    """A copy of a tensor, in its place."""
    planted[name] = planted[name].copy()
    return planted[name]
