"""Weights that are quantized with an eye on what they multiply: the model is run on a text, layer by layer, in float32.

Each layer's inputs say how to even them out (`quantization.smooth`) and how to round its matrices
(`quantization.gptq`). All scaling and shifting goes into the layer norms, the biases and the matrices before, so that
the graph stays that of the plain weights; only the embedding has to multiply by a row of scales. One layer's float32
weights stand in memory at a time, beside what is quantized already.

At 4 bits the layers that are quantized already are run beside those in float32, and each matrix makes up for what they
lost (`quantization.drift`). The table of a tied model comes first then, so that its rounding is made up for too; what
the head multiplies takes a run of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantization.drift import made_up_for
from quantization.int8 import Int8Columns
from quantization.recipes import (
    HIGHEST_CODE,
    INT4,
    TABLE_BLOCK_SIZES,
    WEIGHTS_ONLY,
    Quantized,
    SplitMatrix,
    Tensor,
    TokenTable,
    cache_scale,
    cache_scale_name,
    dequantized,
    matrix_group,
    quantize_matrix,
    quantize_table,
    table_block_size,
)
from quantization.smooth import Evening, even_out, find_outliers, smoothing_factors
from runtime.config import Activation, GPT2Config
from runtime.errors import QuantizationError
from runtime.package import CACHE_KINDS, CacheType

from .checkpoint import EMBEDDING, HEAD
from .checkpoint_files import Float32Array
from .float_layers import activated, attended, embedded, last_hidden, normed

LEAST_ACTIVATION: Mapping[Activation, float] = {"gelu_new": -0.171, "gelu": -0.17, "relu": -1e-6, "silu": -0.279}
"""No output is below; relu has none below 0, but a row of zeros must not be divided by 0."""


def calibrate(
    config: GPT2Config,
    tensors: Mapping[str, Float32Array],
    ids: NDArray[np.int64],
    precision: Quantized,
    progress: Callable[[int, int], None] | None = None,
    *,
    kv_cache: CacheType = "float32",
) -> dict[str, Tensor]:
    """Quantize a model for the inputs that its matrices meet on some text.

    Args:
        config: the model's numbers.
        tensors: canonical name -> float32 array; each is looked up once, or twice, but for a tied embedding.
        ids: token ids [B, T] of the text, 1 <= T <= n_ctx.
        precision: what the matrices become.
        progress: called with the number of matrices' parameters that are done, and of those to be done in all.
        kv_cache: "int8" adds the scales of keys and values, as `quantization.recipes.cache_scale_name` calls them.
    Returns:
        Canonical name -> what takes the tensor's place in the graph.
    Raises:
        QuantizationError: a tensor is not finite, or the model overflows float32.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused where it is used
        return _Calibration(config, tensors, precision, progress or (lambda _done, _total: None), kv_cache).run(ids)


Streams: TypeAlias = "list[Float32Array]"
"""The same tokens' numbers [B, T, n] in the model of float32, alone or followed by those that quantized layers, run
beside it, compute of them."""


class _Calibration:
    """The pass so far: what became of the tensors."""

    def __init__(
        self,
        config: GPT2Config,
        tensors: Mapping[str, Float32Array],
        precision: Quantized,
        progress: Callable[[int, int], None],
        kv_cache: CacheType,
    ) -> None:
        self._kv_cache = kv_cache
        self._config = config
        self._tensors = tensors
        self._precision: Quantized = precision
        self._progress = progress
        self._follows = precision in INT4
        self._table_first = self._follows and config.tie_word_embeddings
        self._done = 0
        layer = config.n_embd * (4 * config.n_embd + 2 * config.n_inner)
        self._total = config.n_layer * layer * (2 if self._table_first else 1)
        self._results: dict[str, Tensor] = {}

    def run(self, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        config = self._config
        if self._table_first:
            self._head(last_hidden(config, self._read, ids, self._count))
        elif not config.tie_word_embeddings:
            self._results[EMBEDDING] = self._untied_embedding()
        positions = self._results["wpe.weight"] = self._read("wpe.weight")
        hidden = [embedded(self._read(EMBEDDING), positions, ids)]
        if self._follows:
            hidden.append(embedded(dequantized(self._results[EMBEDDING]), positions, ids))
        for layer in range(config.n_layer):
            self._attention(f"h.{layer}", layer, hidden)
            self._mlp(f"h.{layer}", hidden)
        if not self._table_first:
            self._head(hidden[-1])
        return self._results

    def _attention(self, name: str, layer: int, hidden: Streams) -> None:
        """Add what attention adds. Its context is evened out by the columns that make its values."""
        config, embd = self._config, self._config.n_embd
        gain, shift = self._read(f"{name}.ln_1.weight"), self._read(f"{name}.ln_1.bias")
        weight, bias = self._read(f"{name}.attn.c_attn.weight"), self._read(f"{name}.attn.c_attn.bias")
        proj, proj_bias = self._read(f"{name}.attn.c_proj.weight"), self._read(f"{name}.attn.c_proj.bias")
        inputs = normed(config, hidden[0], gain, shift)
        qkv = inputs @ weight + bias
        context = attended(config, layer, qkv)
        result: Float32Array = context @ proj + proj_bias

        of_norm = self._evening(inputs, weight)
        of_context = self._evening(context, proj)  # and so of values: their shares add up to 1
        bias = of_norm.of_bias(bias, weight)
        weight[:, 2 * embd :] /= of_context.factors
        bias[2 * embd :] = of_context.of_inputs(bias[2 * embd :])
        if self._kv_cache == "int8":
            _, keys, values = np.split(_rows(qkv), 3, axis=-1)
            for kind, items in zip(CACHE_KINDS, (keys, of_context.of_inputs(values)), strict=True):
                self._results[cache_scale_name(layer, kind)] = cache_scale(items, self._config.n_head)
        all_inputs = self._keep_norm(f"{name}.ln_1", gain, shift, of_norm, hidden)
        self._results[f"{name}.attn.c_attn.bias"] = bias
        proj_bias = self._results[f"{name}.attn.c_proj.bias"] = of_context.of_bias(proj_bias, proj)
        c_attn = self._keep_matrix(f"{name}.attn.c_attn", of_norm.of_matrix(weight), all_inputs)
        contexts = [of_context.of_inputs(context)]
        contexts += [attended(config, layer, x @ dequantized(c_attn) + bias) for x in all_inputs[1:]]
        c_proj = self._keep_matrix(
            f"{name}.attn.c_proj", of_context.of_matrix(proj), contexts, missing=_missing(hidden)
        )
        _add(hidden, result, c_proj, contexts, proj_bias)

    def _mlp(self, name: str, hidden: Streams) -> None:
        """Add what the two-layer network adds. Units with outliers come last, and stay float32."""
        config = self._config
        gain, shift = self._read(f"{name}.ln_2.weight"), self._read(f"{name}.ln_2.bias")
        weight, bias = self._read(f"{name}.mlp.c_fc.weight"), self._read(f"{name}.mlp.c_fc.bias")
        proj, proj_bias = self._read(f"{name}.mlp.c_proj.weight"), self._read(f"{name}.mlp.c_proj.bias")
        inputs = normed(config, hidden[0], gain, shift)
        inner = activated(inputs @ weight + bias, config.activation)  # [B, T, n_inner]
        result: Float32Array = inner @ proj + proj_bias

        whole = self._precision in WEIGHTS_ONLY
        outliers = np.empty(0, np.intp) if whole else find_outliers(_rows(inner))
        order = np.concatenate([np.setdiff1d(np.arange(len(proj)), outliers), outliers]).astype(np.intp)
        of_norm = self._evening(inputs, weight)
        all_inputs = self._keep_norm(f"{name}.ln_2", gain, shift, of_norm, hidden)
        bias = self._results[f"{name}.mlp.c_fc.bias"] = of_norm.of_bias(bias, weight)[order]
        self._results[f"{name}.mlp.c_proj.bias"] = proj_bias
        c_fc = self._keep_matrix(f"{name}.mlp.c_fc", of_norm.of_matrix(weight[:, order]), all_inputs)
        inners = [inner[..., order] if len(outliers) else inner]
        inners += [activated(x @ dequantized(c_fc) + bias, config.activation) for x in all_inputs[1:]]
        c_proj = self._keep_matrix(
            f"{name}.mlp.c_proj",
            proj[order],
            inners,
            missing=_missing(hidden),
            n_kept=len(outliers),
            least_input=LEAST_ACTIVATION[config.activation],
        )
        _add(hidden, result, c_proj, inners, proj_bias)

    def _untied_embedding(self) -> Tensor:
        table = self._read(EMBEDDING)
        if self._precision not in TABLE_BLOCK_SIZES:
            return table
        return TokenTable(quantize_table(table, self._precision))

    def _head(self, hidden: Float32Array) -> None:
        gain, shift = self._read("ln_f.weight"), self._read("ln_f.bias")
        name = EMBEDDING if self._config.tie_word_embeddings else HEAD
        table = self._read(name)
        none = Evening.none(self._config.n_embd)
        if self._precision not in TABLE_BLOCK_SIZES:
            self._keep_norm("ln_f", gain, shift, none)
            self._results[name] = table
            return
        inputs = normed(self._config, hidden, gain, shift)
        if self._precision in WEIGHTS_ONLY:
            self._keep_norm("ln_f", gain, shift, none)
            self._results[name] = TokenTable(quantize_table(table, self._precision, _hessian(inputs)))
            return
        factors = smoothing_factors(
            _rows(inputs),
            table.T,
            highest=HIGHEST_CODE[self._precision],
            group=table_block_size(self._config.n_embd, self._precision),
        )
        # no centre: a head has no bias that could make up for it
        self._keep_norm("ln_f", gain, shift, replace(none, factors=factors))
        blocks = quantize_table(table * factors, self._precision, _hessian(inputs / factors))
        self._results[name] = TokenTable(blocks, np.float32(1) / factors)

    # --- results ---------------------------------------------------------------------------------------------

    def _keep_norm(
        self, name: str, gain: Float32Array, shift: Float32Array, evening: Evening, hidden: Streams | None = None
    ) -> Streams:
        """Keep a layer norm whose output is evened out; what it makes of the hidden state."""
        gain, shift = gain / evening.factors, evening.of_inputs(shift)
        self._results[f"{name}.weight"], self._results[f"{name}.bias"] = gain, shift
        return [normed(self._config, stream, gain, shift) for stream in hidden or []]

    def _keep_matrix(
        self,
        name: str,
        weight: Float32Array,
        inputs: Streams,
        *,
        missing: Float32Array | None = None,
        n_kept: int = 0,
        least_input: float | None = None,
    ) -> Tensor:
        """Quantize a matrix [K, N], but for the rows of its last `n_kept` inputs, which are outliers."""
        hessian = _hessian(inputs[-1])
        wanted = weight
        if len(inputs) > 1:
            exact, rough = map(_rows, inputs)
            wanted = made_up_for(weight, exact, rough, hessian, None if missing is None else _rows(missing))
        n_common = len(weight) - n_kept
        quantized = quantize_matrix(wanted[:n_common], self._precision, hessian[:n_common, :n_common])
        if isinstance(quantized, Int8Columns):
            peak = float(np.abs(inputs[0][..., :n_common]).max())
            quantized = replace(quantized, input_peak=peak, least_input=least_input)
        tensor = SplitMatrix(quantized, wanted[n_common:].copy()) if n_kept else quantized
        self._results[f"{name}.weight"] = tensor
        self._count(weight.size)
        return tensor

    def _count(self, parameters: int) -> None:
        self._done += parameters
        self._progress(self._done, self._total)

    def _evening(self, inputs: Float32Array, weight: Float32Array) -> Evening:
        if self._precision in WEIGHTS_ONLY:  # what multiplies the weights is not rounded
            return Evening.none(len(weight))
        group = matrix_group(len(weight), self._precision)
        return even_out(_rows(inputs), weight, highest=HIGHEST_CODE[self._precision], group=group)

    def _read(self, name: str) -> Float32Array:
        """A tensor, as an array of our own."""
        array = np.array(self._tensors[name])
        if not np.isfinite(array).all():
            raise QuantizationError(f"{name} holds a value that is not finite; the checkpoint is damaged")
        return array


def _missing(hidden: Streams) -> Float32Array | None:
    """What the hidden state of the quantized layers lacks."""
    return hidden[0] - hidden[1] if len(hidden) > 1 else None


def _add(hidden: Streams, result: Float32Array, matrix: Tensor, inputs: Streams, bias: Float32Array) -> None:
    """Add a branch's result to the hidden state, the quantized matrix's to that of the quantized layers."""
    hidden[0] += result
    for place in range(1, len(hidden)):
        hidden[place] += inputs[place] @ dequantized(matrix) + bias


def _rows(inputs: Float32Array) -> Float32Array:
    """[B, T, K] as [B * T, K]."""
    return inputs.reshape(-1, inputs.shape[-1])


def _hessian(inputs: Float32Array) -> Float32Array:
    """X^T X [K, K] of inputs [B, T, K], for their mean: the number of tokens drops out."""
    rows = _rows(inputs)
    result: Float32Array = rows.T @ rows
    return result
