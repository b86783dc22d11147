"""GPT-2's layers in float32, as calibration runs them: fast, many rows of one length at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from runtime.config import Activation, GPT2Config

from .checkpoint import EMBEDDING
from .checkpoint_files import Float32Array

Read = Callable[[str], Float32Array]
"""Canonical name -> float32 array."""


def embedded(table: Float32Array, positions: Float32Array, ids: NDArray[np.int64]) -> Float32Array:
    """The hidden state [B, T, D] that ids [B, T] begin with."""
    rows: Float32Array = table[ids] + positions[: ids.shape[1]]
    return rows


def last_hidden(
    config: GPT2Config, read: Read, ids: NDArray[np.int64], progress: Callable[[int], None]
) -> Float32Array:
    """Run all layers.

    Args:
        config: the model's numbers.
        read: looks up a tensor.
        ids: token ids [B, T].
        progress: called with the number of parameters of a matrix that was multiplied by.
    Returns:
        The hidden state [B, T, D] float32 behind the last.
    """

    def linear(name: str, x: Float32Array) -> Float32Array:
        weight = read(f"{name}.weight")
        progress(weight.size)
        product: Float32Array = x @ weight
        product += read(f"{name}.bias")
        return product

    def norm(name: str) -> Float32Array:
        return normed(config, hidden, read(f"{name}.weight"), read(f"{name}.bias"))

    hidden = embedded(read(EMBEDDING), read("wpe.weight"), ids)
    for layer in range(config.n_layer):
        name = f"h.{layer}"
        context = attended(config, layer, linear(f"{name}.attn.c_attn", norm(f"{name}.ln_1")))
        hidden += linear(f"{name}.attn.c_proj", context)
        inner = activated(linear(f"{name}.mlp.c_fc", norm(f"{name}.ln_2")), config.activation)
        hidden += linear(f"{name}.mlp.c_proj", inner)
    return hidden


def normed(config: GPT2Config, hidden: Float32Array, gain: Float32Array, shift: Float32Array) -> Float32Array:
    """The layer norm of hidden [B, T, D]."""
    centred: Float32Array = hidden - hidden.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    centred /= np.sqrt(variance + np.float32(config.layer_norm_epsilon))
    centred *= gain
    centred += shift
    return centred


def attended(config: GPT2Config, layer: int, qkv: Float32Array) -> Float32Array:
    """Attention's mean of values [B, T, D] of queries, keys and values [B, T, 3D], each token seeing its past."""
    batch, length, _ = qkv.shape
    heads = qkv.reshape(batch, length, 3, config.n_head, config.head_dim).transpose(2, 0, 3, 1, 4)
    future = ~np.tri(length, dtype=np.bool_)  # [T, T]
    context: Float32Array = np.empty((batch, length, config.n_head, config.head_dim), np.float32)
    for row, (query, key, value) in enumerate(zip(*heads, strict=True)):  # [H, T, D] each
        scores = query @ key.transpose(0, 2, 1) * np.float32(config.attention_scale(layer))
        scores[:, future] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        context[row] = (scores @ value).transpose(1, 0, 2)
    return context.reshape(batch, length, -1)


def activated(x: Float32Array, activation: Activation) -> Float32Array:
    """The activation, in place. The tanh form stands in for exact gelu too: they differ by less than 0.001."""
    match activation:
        case "relu":
            return np.maximum(x, 0, out=x)
        case "silu":
            half = np.float32(0.5) * x
            np.tanh(half, out=half)
        case "gelu_new" | "gelu":
            half = x * x
            half *= np.float32(0.044715)
            half += 1
            half *= x
            half *= np.float32(math.sqrt(2 / math.pi))
            np.tanh(half, out=half)
    # x / 2 * (1 + tanh(...))
    half += 1
    half *= np.float32(0.5)
    x *= half
    return x
