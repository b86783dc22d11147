"""Queries that are scaled where they are made, so that scores need no scaling: in the weights of c_attn.

softmax(s q . k) = softmax((s q) . k). s is 1/8 in all of OpenAI's sizes, a power of two: nothing is rounded.
"""

from __future__ import annotations

import numpy as np

from quantization.recipes import Tensor, times_columns
from runtime.config import GPT2Config

from .lazy_tensors import LazyTensors
from .products import Tensors


class ScaledQueries(LazyTensors[Tensor]):
    """The same model as `tensors`, for attention that does not scale its scores."""

    def __init__(self, config: GPT2Config, tensors: Tensors) -> None:
        super().__init__(tensors)
        self._tensors = tensors
        self._factors = {}  # of the columns of c_attn: queries, keys, values
        for layer in range(config.n_layer):
            factors = np.ones(3 * config.n_embd, np.float32)
            factors[: config.n_embd] = config.attention_scale(layer)
            for kind in ("weight", "bias"):
                self._factors[f"h.{layer}.attn.c_attn.{kind}"] = factors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return times_columns(tensor, self._factors[name]) if name in self._factors else tensor
