"""GPT-2's forward pass in plain numpy: the oracle that every exported package is measured against.

It is independent, sharing no code with the graph builder, and exact: the weights are float32 as read, every operation
on them is float64, and the logits are rounded to float32 at the end. So a difference from it is the error of whatever
is compared with it, and its own numbers move by at most that last rounding between processors, or when other
sequences are computed beside.

Sources: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3, for the model;
Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1, for attention; Ba et al., "Layer Normalization"
(2016), equation 4; Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), section 2, for both forms of gelu.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.config import Activation, GPT2Config
from runtime.errors import RequestError

Float64Array = NDArray[np.float64]
Tensors = Mapping[str, NDArray[np.float32]]
Watch = Callable[[str, Float64Array], None]
"""Is shown what is computed on the way, by one of these names."""

RESIDUAL, BRANCH, INNER, QKV, SCORES = "residual", "branches", "inner units", "queries keys values", "scores"

HEAD_ROWS = 1024
"""Vocabulary rows of the head per product: float64 copies of 10 MB at 774M instead of one of 515 MB; also the fastest
of 1024, 2048, 4096 and 8192."""


def reference_logits(
    config: GPT2Config,
    tensors: Tensors,
    sequences: Sequence[NDArray[np.int64]],
    progress: Callable[[str], None] | None = None,
    *,
    watch: Watch | None = None,
) -> list[NDArray[np.float32]]:
    """Compute the logits of every position of several token sequences.

    All sequences pass through a layer together, so each tensor is looked up once and let go before the next: a lazy
    mapping is read once, except a tied "wte.weight", which is read for the embedding and again for the head. Peak
    memory is about the largest tensor, plus the logits.

    Args:
        config: the model's numbers.
        tensors: float32 under canonical names ("wte.weight", "h.0.attn.c_attn.weight", ...), matrices [in, out],
            "lm_head.weight" [V, n_embd] only where the head is not tied.
        sequences: token ids, each [T] int64 with 1 to n_ctx tokens; lengths may differ.
        progress: called with one line of text before each layer and before the head.
        watch: called with what is computed on the way.

    Returns:
        For each sequence its logits, [T, V] float32.

    Raises:
        RequestError: a sequence is empty, too long or not one row, or holds an id that the vocabulary lacks; all
            such sequences are named.
    """
    _check_sequences(config, sequences)
    if not sequences:
        return []
    report, shown = progress or (lambda _line: None), watch or (lambda _name, _values: None)
    ends = np.cumsum([len(ids) for ids in sequences])
    spans = [slice(end - len(ids), end) for ids, end in zip(sequences, ends, strict=True)]

    # N = sum of T: the rows of all sequences, one below the other.
    positions = np.concatenate([np.arange(len(ids)) for ids in sequences])
    hidden = tensors["wte.weight"][np.concatenate(sequences)].astype(np.float64)  # [N, n_embd]
    hidden += tensors["wpe.weight"][positions]
    for layer in range(config.n_layer):
        report(f"reference: layer {layer + 1} of {config.n_layer}")
        hidden += _attention_branch(config, tensors, layer, hidden, spans=spans, shown=shown)
        shown(RESIDUAL, hidden)
        hidden += _mlp_branch(config, tensors, layer, hidden, shown)
        shown(RESIDUAL, hidden)
    report("reference: head")
    logits = _head(config, tensors, _layer_norm(config, tensors, "ln_f", hidden))  # [N, V]
    return [logits[rows] for rows in spans]


def _check_sequences(config: GPT2Config, sequences: Sequence[NDArray[np.int64]]) -> None:
    faults = []
    for index, ids in enumerate(sequences):
        if ids.ndim != 1 or not 1 <= len(ids) <= config.n_ctx:
            faults.append(f"sequence {index} has shape {ids.shape}, expected 1 to {config.n_ctx} token ids")
            continue
        outside = np.flatnonzero((ids < 0) | (ids >= config.n_vocab))
        if outside.size:
            place = outside[0]
            faults.append(f"sequence {index} has id {ids[place]} at {place}, expected 0 to {config.n_vocab - 1}")
    if faults:
        raise RequestError("reference logits: " + "; ".join(faults))


def _attention_branch(
    config: GPT2Config, tensors: Tensors, layer: int, hidden: Float64Array, *, spans: Sequence[slice], shown: Watch
) -> Float64Array:
    """What the attention of `layer` adds to hidden [N, n_embd]; each span of rows attends to itself only."""
    normed = _layer_norm(config, tensors, f"h.{layer}.ln_1", hidden)
    qkv = _linear(tensors, f"h.{layer}.attn.c_attn", normed)
    shown(QKV, qkv)
    query, key, value = np.split(qkv, 3, axis=1)  # [N, n_embd] each
    scale = config.attention_scale(layer)
    context = np.empty_like(query)
    for rows in spans:
        future = ~np.tri(rows.stop - rows.start, dtype=np.bool_)  # [T, T]
        for start in range(0, config.n_embd, config.head_dim):
            head = rows, slice(start, start + config.head_dim)  # [T, D] of query, key and value
            # softmax(q k^T * scale) v, each token seeing itself and what stands before it
            scores = query[head] @ key[head].T * scale  # [T, T]
            shown(SCORES, scores)
            scores[future] = -np.inf
            context[head] = _softmax(scores) @ value[head]
    branch = _linear(tensors, f"h.{layer}.attn.c_proj", context)
    shown(BRANCH, branch)
    return branch


def _mlp_branch(config: GPT2Config, tensors: Tensors, layer: int, hidden: Float64Array, shown: Watch) -> Float64Array:
    """What the two-layer network of `layer` adds to hidden [N, n_embd]."""
    normed = _layer_norm(config, tensors, f"h.{layer}.ln_2", hidden)
    inner = _linear(tensors, f"h.{layer}.mlp.c_fc", normed)  # [N, n_inner]
    shown(INNER, inner)
    branch = _linear(tensors, f"h.{layer}.mlp.c_proj", ACTIVATIONS[config.activation](inner))
    shown(BRANCH, branch)
    return branch


def _head(config: GPT2Config, tensors: Tensors, hidden: Float64Array) -> NDArray[np.float32]:
    weight = tensors["wte.weight" if config.tie_word_embeddings else "lm_head.weight"]  # [V, n_embd]
    logits = np.empty((len(hidden), config.n_vocab), np.float32)
    for start in range(0, config.n_vocab, HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        logits[:, rows] = hidden @ weight[rows].T
    return logits


def _linear(tensors: Tensors, name: str, x: Float64Array) -> Float64Array:
    # float64 @ float32 is computed in float64
    y: Float64Array = x @ tensors[f"{name}.weight"]
    y += tensors[f"{name}.bias"]
    return y


def _layer_norm(config: GPT2Config, tensors: Tensors, name: str, x: Float64Array) -> Float64Array:
    # (x - mean) / sqrt(variance + epsilon) * weight + bias, over the last axis
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    normed: Float64Array = centred / np.sqrt(variance + config.layer_norm_epsilon)
    return normed * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def _softmax(scores: Float64Array) -> Float64Array:
    # subtracting the maximum changes nothing but keeps exp from overflowing
    weights: Float64Array = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def _gelu_new(x: Float64Array) -> Float64Array:
    # x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    tanh: Float64Array = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return x / 2 * (1 + tanh)


def _gelu(x: Float64Array) -> Float64Array:
    # x P(X <= x) for a standard normal X: x/2 erfc(-x / sqrt(2))
    erfc: Float64Array = _erfc(x / -math.sqrt(2))
    return x / 2 * erfc


def _relu(x: Float64Array) -> Float64Array:
    return np.maximum(x, 0)


def _silu(x: Float64Array) -> Float64Array:
    # x / (1 + exp(-x)), written with tanh since that exp overflows
    tanh: Float64Array = np.tanh(x / 2)
    return x / 2 * (1 + tanh)


# numpy has no erfc. One call of the C library per element costs 0.1 to 0.15 us: 4 s more at 774M, 150 tokens.
_erfc = np.vectorize(math.erfc, otypes=[np.float64])

ACTIVATIONS: Mapping[Activation, Callable[[Float64Array], Float64Array]] = {
    "gelu_new": _gelu_new,
    "gelu": _gelu,
    "relu": _relu,
    "silu": _silu,
}
"""float64 in, float64 of the same shape out."""
