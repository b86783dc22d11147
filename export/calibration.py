"""Weights that are quantized with an eye on what they multiply: the model is run once, layer by layer, in float32.

Each layer's inputs say how to even them out (`quantization.smooth`) and how to round its matrices
(`quantization.gptq`). All scaling goes into the layer norms and into the matrices before, so that the graph stays that
of the plain weights; only the embedding has to multiply by a row of scales. One layer's float32 weights stand in memory
at a time, beside what is quantized already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from quantization.blocks import Blocks
from quantization.int8 import Int8Columns
from quantization.recipes import (
    HIGHEST_CODE,
    TABLE_BLOCK_SIZES,
    WEIGHTS_ONLY,
    Quantized,
    SplitMatrix,
    Tensor,
    TokenTable,
    cache_scale,
    cache_scale_name,
    matrix_group,
    quantize_matrix,
    quantize_table,
    table_block_size,
)
from quantization.smooth import find_outliers, smoothing_factors
from runtime.config import Activation, GPT2Config
from runtime.errors import QuantizationError
from runtime.package import CACHE_KINDS, CacheType

from .checkpoint import EMBEDDING, HEAD
from .checkpoint_files import Float32Array

LEAST_ACTIVATION: Mapping[Activation, float] = {"gelu_new": -0.171, "gelu": -0.17, "relu": -1e-6, "silu": -0.279}
"""No output is below; relu has none below 0, but a row of zeros must not be divided by 0."""


def calibrate(
    config: GPT2Config,
    tensors: Mapping[str, Float32Array],
    ids: NDArray[np.int64],
    precision: Quantized,
    progress: Callable[[int], None] | None = None,
    *,
    kv_cache: CacheType = "float32",
) -> dict[str, Tensor]:
    """Quantize a model for the inputs that its matrices meet on some text.

    Args:
        config: the model's numbers.
        tensors: canonical name -> float32 array; each is looked up once, but for a tied embedding.
        ids: token ids [B, T] of the text, 1 <= T <= n_ctx.
        precision: what the matrices become.
        progress: called with the number of parameters that are done.
        kv_cache: "int8" adds the scales of keys and values, as `quantization.recipes.cache_scale_name` calls them.
    Returns:
        Canonical name -> what takes the tensor's place in the graph.
    Raises:
        QuantizationError: a tensor is not finite, or the model overflows float32.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused where it is used
        return _Calibration(config, tensors, precision, progress or (lambda _done: None), kv_cache).run(ids)


class _Calibration:
    """The pass so far: the hidden state [B, T, D], and what became of the tensors."""

    def __init__(
        self,
        config: GPT2Config,
        tensors: Mapping[str, Float32Array],
        precision: Quantized,
        progress: Callable[[int], None],
        kv_cache: CacheType,
    ) -> None:
        self._kv_cache = kv_cache
        self._config = config
        self._tensors = tensors
        self._precision: Quantized = precision
        self._progress = progress
        self._done = 0
        self._results: dict[str, Tensor] = {}

    def run(self, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        positions = self._results["wpe.weight"] = self._read("wpe.weight")
        hidden = self._read(EMBEDDING)[ids] + positions[: ids.shape[1]]
        for layer in range(self._config.n_layer):
            hidden += self._attention(f"h.{layer}", layer, hidden)
            hidden += self._mlp(f"h.{layer}", hidden)
        self._head(hidden)
        return self._results

    def _attention(self, name: str, layer: int, hidden: Float32Array) -> Float32Array:
        """What attention adds to the hidden state. Its context is evened out by the columns that make its values."""
        embd = self._config.n_embd
        gain, shift = self._read(f"{name}.ln_1.weight"), self._read(f"{name}.ln_1.bias")
        weight, bias = self._read(f"{name}.attn.c_attn.weight"), self._read(f"{name}.attn.c_attn.bias")
        proj, proj_bias = self._read(f"{name}.attn.c_proj.weight"), self._read(f"{name}.attn.c_proj.bias")
        normed = self._normed(hidden, gain, shift)
        qkv = normed @ weight + bias
        context = self._context(layer, qkv)
        result: Float32Array = context @ proj + proj_bias

        value_factors = self._factors(context, proj)
        weight[:, 2 * embd :] /= value_factors
        bias[2 * embd :] /= value_factors
        if self._kv_cache == "int8":
            _, keys, values = np.split(_rows(qkv), 3, axis=-1)
            for kind, items in zip(CACHE_KINDS, (keys, values / value_factors), strict=True):
                self._results[cache_scale_name(layer, kind)] = cache_scale(items, self._config.n_head)
        factors = self._factors(normed, weight)
        self._keep_norm(f"{name}.ln_1", gain / factors, shift / factors)
        self._results[f"{name}.attn.c_attn.bias"] = bias
        self._results[f"{name}.attn.c_proj.bias"] = proj_bias
        self._keep_matrix(f"{name}.attn.c_attn", weight * factors[:, None], normed / factors)
        self._keep_matrix(f"{name}.attn.c_proj", proj * value_factors[:, None], context / value_factors)
        return result

    def _mlp(self, name: str, hidden: Float32Array) -> Float32Array:
        """What the two-layer network adds to the hidden state. Units with outliers come last, and stay float32."""
        gain, shift = self._read(f"{name}.ln_2.weight"), self._read(f"{name}.ln_2.bias")
        weight, bias = self._read(f"{name}.mlp.c_fc.weight"), self._read(f"{name}.mlp.c_fc.bias")
        proj, proj_bias = self._read(f"{name}.mlp.c_proj.weight"), self._read(f"{name}.mlp.c_proj.bias")
        normed = self._normed(hidden, gain, shift)
        inner = _activate(normed @ weight + bias, self._config.activation)  # [B, T, n_inner]
        result: Float32Array = inner @ proj + proj_bias

        whole = self._precision in WEIGHTS_ONLY
        outliers = np.empty(0, np.intp) if whole else find_outliers(_rows(inner))
        order = np.concatenate([np.setdiff1d(np.arange(len(proj)), outliers), outliers]).astype(np.intp)
        factors = self._factors(normed, weight)
        self._keep_norm(f"{name}.ln_2", gain / factors, shift / factors)
        self._results[f"{name}.mlp.c_fc.bias"] = bias[order]
        self._results[f"{name}.mlp.c_proj.bias"] = proj_bias
        self._keep_matrix(f"{name}.mlp.c_fc", weight[:, order] * factors[:, None], normed / factors)
        self._keep_split_matrix(f"{name}.mlp.c_proj", proj[order], inner[..., order], n_kept=len(outliers))
        return result

    def _head(self, hidden: Float32Array) -> None:
        gain, shift = self._read("ln_f.weight"), self._read("ln_f.bias")
        tied = self._config.tie_word_embeddings
        name = EMBEDDING if tied else HEAD
        table = self._read(name)
        if self._precision not in TABLE_BLOCK_SIZES:
            self._keep_norm("ln_f", gain, shift)
            self._results[EMBEDDING], self._results[name] = self._read(EMBEDDING), table
            return
        if not tied:
            self._results[EMBEDDING] = TokenTable(quantize_table(self._read(EMBEDDING), self._precision))
        normed = self._normed(hidden, gain, shift)
        if self._precision in WEIGHTS_ONLY:
            self._keep_norm("ln_f", gain, shift)
            self._results[name] = TokenTable(quantize_table(table, self._precision, _hessian(normed)))
            return
        factors = smoothing_factors(
            _rows(normed),
            table.T,
            highest=HIGHEST_CODE[self._precision],
            group=table_block_size(self._config.n_embd, self._precision),
        )
        self._keep_norm("ln_f", gain / factors, shift / factors)
        blocks = quantize_table(table * factors, self._precision, _hessian(normed / factors))
        self._results[name] = TokenTable(blocks, np.float32(1) / factors)

    # --- results ---------------------------------------------------------------------------------------------

    def _keep_norm(self, name: str, gain: Float32Array, shift: Float32Array) -> None:
        self._results[f"{name}.weight"], self._results[f"{name}.bias"] = gain, shift

    def _keep_matrix(self, name: str, weight: Float32Array, inputs: Float32Array) -> None:
        self._results[f"{name}.weight"] = self._quantized(weight, inputs)
        self._done += weight.size
        self._progress(self._done)

    def _keep_split_matrix(self, name: str, weight: Float32Array, inputs: Float32Array, *, n_kept: int) -> None:
        """The matrix behind the activation, whose last inputs are outliers."""
        n_common = len(weight) - n_kept
        quantized = self._quantized(weight[:n_common], inputs[..., :n_common])
        if isinstance(quantized, Int8Columns):
            quantized = replace(quantized, least_input=LEAST_ACTIVATION[self._config.activation])
        self._results[f"{name}.weight"] = SplitMatrix(quantized, weight[n_common:]) if n_kept else quantized
        self._done += weight.size
        self._progress(self._done)

    def _quantized(self, weight: Float32Array, inputs: Float32Array) -> Int8Columns | Blocks:
        quantized = quantize_matrix(weight, self._precision, _hessian(inputs))
        if isinstance(quantized, Int8Columns):
            return replace(quantized, input_peak=float(np.abs(inputs).max()))
        return quantized

    def _factors(self, inputs: Float32Array, weight: Float32Array) -> Float32Array:
        if self._precision in WEIGHTS_ONLY:  # what multiplies the weights is not rounded
            return np.ones(len(weight), np.float32)
        group = matrix_group(len(weight), self._precision)
        return smoothing_factors(_rows(inputs), weight, highest=HIGHEST_CODE[self._precision], group=group)

    def _read(self, name: str) -> Float32Array:
        """A tensor, as an array of our own."""
        array = np.array(self._tensors[name])
        if not np.isfinite(array).all():
            raise QuantizationError(f"{name} holds a value that is not finite; the checkpoint is damaged")
        return array

    # --- the model in float32 ----------------------------------------------------------------------------------

    def _normed(self, hidden: Float32Array, gain: Float32Array, shift: Float32Array) -> Float32Array:
        centred: Float32Array = hidden - hidden.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        centred /= np.sqrt(variance + np.float32(self._config.layer_norm_epsilon))
        centred *= gain
        centred += shift
        return centred

    def _context(self, layer: int, qkv: Float32Array) -> Float32Array:
        """Attention's mean of values [B, T, D] of queries, keys and values [B, T, 3D], each token seeing its past."""
        batch, length, _ = qkv.shape
        heads = qkv.reshape(batch, length, 3, self._config.n_head, self._config.head_dim).transpose(2, 0, 3, 1, 4)
        future = ~np.tri(length, dtype=np.bool_)  # [T, T]
        context: Float32Array = np.empty((batch, length, self._config.n_head, self._config.head_dim), np.float32)
        for row, (query, key, value) in enumerate(zip(*heads, strict=True)):  # [H, T, D] each
            scores = query @ key.transpose(0, 2, 1) * np.float32(self._config.attention_scale(layer))
            scores[:, future] = -np.inf
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            context[row] = (scores @ value).transpose(1, 0, 2)
        return context.reshape(batch, length, -1)


def _rows(inputs: Float32Array) -> Float32Array:
    """[B, T, K] as [B * T, K]."""
    return inputs.reshape(-1, inputs.shape[-1])


def _hessian(inputs: Float32Array) -> Float32Array:
    """X^T X [K, K] of inputs [B, T, K], for their mean: the number of tokens drops out."""
    rows = _rows(inputs)
    result: Float32Array = rows.T @ rows
    return result


def _activate(x: Float32Array, activation: Activation) -> Float32Array:
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
