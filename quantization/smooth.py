"""Inputs of a matrix made even, so that the steps that they are rounded to are not spent on what a few channels hold.

(x - c) / s @ (s * w) + c @ w = x @ w for any c, and any s > 0, a number for each input channel. What makes x subtracts
and divides, the rest goes into the matrix and its bias. Inputs that no scale can even out are set apart, to be
multiplied in float32.

Sources: Xiao et al., "SmoothQuant" (2022), equation 4; Wei et al., "Outlier Suppression+" (2023), section 3, for the
shift; Dettmers et al., "LLM.int8()" (2022), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .grid import Float32Array
from .int8 import INT8_MAX

STRENGTHS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the unevenness that go from the inputs to the weights; 0 is tried as no scaling at all."""

SMALLEST_SHARE = 1e-5
"""Of the largest channel: a channel below it counts as that large, so that a dead one gets no extreme factor."""

SAMPLE = 1024
"""Rows of inputs, and columns of a matrix, that are enough to tell how large the steps of either would be."""

OUTLIERS = (4, 8, 16)
"""How many inputs may be set apart; each such product costs four operators at run time."""

OUTLIERS_WORTH = 8.0
"""Inputs are set apart where the noise of the others falls to one part in this many."""


@dataclass(frozen=True, slots=True)
class Evening:
    """What is done to the inputs x of a matrix: x' = (x - centre) / factors."""

    centre: Float32Array  # [K]
    factors: Float32Array  # [K]

    @classmethod
    def none(cls, n_channels: int) -> Evening:
        return cls(np.zeros(n_channels, np.float32), np.ones(n_channels, np.float32))

    def of_inputs(self, inputs: Float32Array) -> Float32Array:
        """x' [..., K]."""
        result: Float32Array = (inputs - self.centre) / self.factors
        return result

    def of_matrix(self, weight: Float32Array) -> Float32Array:
        """What multiplies x' [K, N]."""
        return weight * self.factors[:, None]

    def of_bias(self, bias: Float32Array, weight: Float32Array) -> Float32Array:
        """What is added to that product [N]; `weight` is the matrix as it was."""
        result: Float32Array = bias + self.centre @ weight
        return result


def even_out(inputs: Float32Array, weight: Float32Array, *, highest: int, group: int) -> Evening:
    """The mean of each channel taken away, and the factors of `smoothing_factors` for the rest; arguments as there."""
    centre = inputs.mean(axis=0)
    return Evening(centre, smoothing_factors(inputs - centre, weight, highest=highest, group=group))


def smoothing_factors(inputs: Float32Array, weight: Float32Array, *, highest: int, group: int) -> Float32Array:
    """Factors s [K] by which inputs are to be divided and rows of the matrix multiplied.

    s_k = max|x_k|^a / max|w_k|^(1 - a), with the strength a that leaves the least noise once both are rounded.

    Args:
        inputs: [T, K] float32, what the matrix is multiplied by.
        weight: [K, N] float32.
        highest: the largest code of a weight.
        group: neighbouring channels that share a scale, of inputs and of weights.
    Returns:
        [K] float32, their geometric mean 1; all 1 where no strength helps.
    """
    x, w = np.abs(inputs[:: 1 + len(inputs) // SAMPLE]), np.abs(weight[:, :: 1 + weight.shape[1] // SAMPLE])
    largest_input, largest_weight = _at_least(np.abs(inputs).max(axis=0)), _at_least(np.abs(weight).max(axis=1))
    best, least = np.ones(len(weight), np.float32), np.inf
    for strength in STRENGTHS:
        factors = largest_input**strength / largest_weight ** (1 - strength) if strength else np.ones_like(best)
        factors = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
        noise = _noise(x / factors, w * factors[:, None], highest, group)
        if noise < least:
            best, least = factors, noise
    return best


def _noise(x: Float32Array, w: Float32Array, highest: int, group: int) -> float:
    """Expected squared error of the products of inputs of size x and weights of size w, up to a factor.

    If roundings are uniform and independent: each is off by step / sqrt(12), which counts for an input by its weights,
    for a weight by its inputs.
    """
    starts = np.arange(0, len(w), group)
    input_steps = np.maximum.reduceat(x, starts, axis=1) / np.float32(INT8_MAX)  # [T, G]
    weight_steps = np.maximum.reduceat(w, starts, axis=0) / np.float32(highest)  # [G, N]
    weight_power = np.add.reduceat(np.einsum("kn,kn->k", w, w), starts)  # [G]
    input_power = np.add.reduceat(np.einsum("tk,tk->k", x, x), starts) / len(x)
    by_inputs = np.square(input_steps).mean(axis=0) @ weight_power
    return float(by_inputs + np.square(weight_steps).sum(axis=1) @ input_power)


def _at_least(peak: Float32Array) -> Float32Array:
    floor = max(float(peak.max()) * SMALLEST_SHARE, float(np.finfo(np.float32).tiny))
    result: Float32Array = np.maximum(peak, np.float32(floor))
    return result


def find_outliers(inputs: Float32Array) -> NDArray[np.intp]:
    """The few channels of inputs [T, K] that alone make the largest values of most rows; empty where there are none.

    The noise of a row's rounding goes with the square of its largest value.
    """
    size = np.abs(inputs)
    by_size = np.argsort(-size.max(axis=0), kind="stable")
    counts = [count for count in (0, *OUTLIERS) if count < len(by_size)]
    beyond = np.delete(size, by_size[: counts[-1]], axis=1).max(axis=1)  # [T], the largest of the common inputs
    noise = [
        float(np.square(np.maximum(beyond, size[:, by_size[count : counts[-1]]].max(axis=1, initial=0))).mean())
        for count in counts
    ]
    enough = (count for count, left in zip(counts, noise, strict=True) if left * OUTLIERS_WORTH <= noise[0])
    return by_size[: next(enough, 0)]
