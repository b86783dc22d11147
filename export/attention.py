"""Attention for the CPU: what the mask says, read once, and each layer's operator, over keys and values of either type.

onnxruntime's GroupQueryAttention appends new keys and values to the cache, in place where past and present are one
buffer, and attends to all of it. On int8 keys and values it is fast for a step, and slow for a prompt: it converts
every key anew for every query. A prompt takes another branch, therefore, where they are converted once and a plain
attention follows. 774M int8, two threads of an AMD EPYC (Zen 5): 0.82 of the time to the first token of 128, and 0.58
of that of 900, as fast as with float32 keys; choosing the branch takes 0.01 ms a layer.

Scores are not scaled: the queries are, by the weights that make them (`export.queries`).

Source: onnxruntime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from onnx import TensorProto

from runtime.config import GPT2Config
from runtime.package import ATTENTION_MASK, CACHE_KINDS, INPUT_IDS, Attention, past_name, present_name

from .onnx_builder import MICROSOFT, GraphBuilder

ATTENTION: Attention = "GroupQueryAttention"

CacheScales: TypeAlias = "tuple[str, str]"
"""Initializers [1, H, 1, D] float32: the scales of a layer's int8 keys, and of its values."""

MASKED_SCORE = -1e9
"""Added to the score of a key that the mask hides. Finite: a row of padding alone stays finite, and spreads no NaN."""

NO_SINK = -1e30
"""A sink that takes no part of any softmax. With one, onnxruntime reads a cache in one pass over all of it instead of
block by block. An int8 one: 0.7 of the time of a step behind 128 tokens, 0.8 of that behind 900. A float32 one, with
scores that need no scaling: 0.72 of attention's time in a step of 8 rows behind 60 tokens, 0.8 in a prompt of 128."""

SCORE_SCALE = 1.0
"""onnxruntime 1.32 multiplies one query by float32 keys as they lie; by a factor, too, only once it has packed a copy
of all of them."""


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One of a model's layers; `scales` are those of int8 keys and values, None where they are float32."""

    config: GPT2Config
    index: int
    scales: CacheScales | None = None

    @property
    def context(self) -> str:
        return f"h.{self.index}.attn/context"

    @property
    def past(self) -> list[str]:
        return [past_name(self.index, kind) for kind in CACHE_KINDS]

    @property
    def present(self) -> list[str]:
        return [present_name(self.index, kind) for kind in CACHE_KINDS]


@dataclass(frozen=True, slots=True)
class PromptInputs:
    """What the branch of prompts is told, for B rows of S new tokens behind P others, T = P + S."""

    taken: str  # scalar bool: there are several new tokens
    fits: str  # scalar bool: the past's buffers are T tokens long or longer; else they are P, and the present's T
    places: str  # [B, H, S, 3] int64: row, head and place of each new key
    total: str  # [1] int64, T
    bias: str  # [B, 1, S, T] float32: that of the mask, and later tokens hidden


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What every layer's attention is told about the mask."""

    last_key: str  # [B] int32, index of a row's last key
    total_length: str  # scalar int32, P + S
    bias: str  # [B, 1, S, P + S] float32
    prompt: PromptInputs | None  # for an int8 cache


def read_mask(graph: GraphBuilder, config: GPT2Config, *, int8_cache: bool) -> AttentionInputs:
    """One reading for every kind of padding.

    The last key of a row is the largest index with a 1 (a sum of ones would be wrong for left padding), and keys
    with a 0 before it are hidden by a bias.
    """
    node, constant = graph.node, graph.constant
    total = node("Shape", [ATTENTION_MASK], "mask/total", start=1, end=2)  # [1]
    length = node("Squeeze", [total], "mask/length")  # scalar
    index = node("Range", [constant(0, np.int64), length, constant(1, np.int64)], "mask/index")  # [T]
    visible_index = node("Mul", [ATTENTION_MASK, index], "mask/visible_index")
    last = node("ReduceMax", [visible_index, constant([1], np.int64)], "mask/last", keepdims=0)
    visible = node("Cast", [ATTENTION_MASK], "mask/visible", to=TensorProto.FLOAT)
    hidden = node("Sub", [constant(1, np.float32), visible], "mask/hidden")
    penalty = node("Mul", [hidden, constant(MASKED_SCORE, np.float32)], "mask/penalty")  # [B, T]
    per_head = node("Unsqueeze", [penalty, constant([1, 2], np.int64)], "mask/penalty_per_head")  # [B, 1, 1, T]
    new = node("Shape", [INPUT_IDS], "mask/new", start=1, end=2)
    shape = node("Concat", [constant([1, 1], np.int64), new, constant([1], np.int64)], "mask/bias_shape", axis=0)
    bias = node("Expand", [per_head, shape], "mask/bias")  # [B, 1, S, T]
    return AttentionInputs(
        last_key=node("Cast", [last], "mask/last_key", to=TensorProto.INT32),
        total_length=node("Cast", [length], "mask/total_length", to=TensorProto.INT32),
        bias=bias,
        prompt=_prompt_inputs(graph, config, total=total, index=index, new=new, bias=bias) if int8_cache else None,
    )


def write_attention(graph: GraphBuilder, layer: AttentionLayer, qkv: str, mask: AttentionInputs) -> str:
    """qkv [B, S, 3D], scaled queries first -> context [B, S, D]; past keys and values -> present ones."""
    outputs = [layer.context, *layer.present]
    if mask.prompt is None:
        _write_fused(graph, layer, qkv, mask, outputs)
        return layer.context
    step, prompt = graph.branch(), graph.branch()
    _write_fused(step, layer, qkv, mask, _declared(step, layer.config, outputs, "step"))
    _write_for_prompt(prompt, layer, qkv, mask.prompt, _declared(prompt, layer.config, outputs, "prompt"))
    graph.choose(mask.prompt.taken, prompt, step, outputs)
    return layer.context


def _declared(branch: GraphBuilder, config: GPT2Config, outputs: Sequence[str], suffix: str) -> list[str]:
    """The outputs of a branch: the context [B, S, D], and two parts of the cache [B, H, M, D / H]."""
    context, *present = (f"{output}/{suffix}" for output in outputs)
    branch.output(context, TensorProto.FLOAT, ["rows", "new", config.n_embd])
    for name in present:
        _declare_cache(branch, config, name)
    return [context, *present]


def _declare_cache(branch: GraphBuilder, config: GPT2Config, name: str) -> None:
    branch.output(name, TensorProto.INT8, ["rows", config.n_head, "places", config.head_dim])


def _write_fused(
    graph: GraphBuilder, layer: AttentionLayer, qkv: str, mask: AttentionInputs, outputs: Sequence[str]
) -> None:
    config, no_rotary = layer.config, ["", "", ""]
    sink = graph.constant([NO_SINK] * config.n_head, np.float32)
    inputs = [qkv, "", "", *layer.past, mask.last_key, mask.total_length, *no_rotary, mask.bias, sink]
    quantization: dict[str, str | int] = {}
    if layer.scales is not None:
        inputs += layer.scales
        quantization = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    graph.node_with_outputs(
        ATTENTION,
        inputs,
        outputs,
        domain=MICROSOFT,
        num_heads=config.n_head,
        kv_num_heads=config.n_head,
        scale=SCORE_SCALE,
        **quantization,
    )


def _prompt_inputs(
    graph: GraphBuilder, config: GPT2Config, *, total: str, index: str, new: str, bias: str
) -> PromptInputs:
    """From what was read of the mask: T and S [1], the indices [T] of all keys, and the bias [B, 1, S, T]."""
    node, constant = graph.node, graph.constant
    zero, one = constant(0, np.int64), constant(1, np.int64)
    rows = node("Shape", [INPUT_IDS], "prompt/rows", start=0, end=1)
    room = node("Shape", [past_name(0, CACHE_KINDS[0])], "prompt/room", start=2, end=3)
    n_rows = node("Squeeze", [rows], "prompt/n_rows")
    past = node("Sub", [total, new], "prompt/past")
    shape = node(
        "Concat", [rows, constant([config.n_head], np.int64), new, constant([1], np.int64)], "prompt/shape", axis=0
    )
    row = node("Range", [zero, n_rows, one], "prompt/row")
    row = node("Unsqueeze", [row, constant([1, 2, 3], np.int64)], "prompt/row/of_place")  # [B, 1, 1, 1]
    head = constant(np.arange(config.n_head).reshape(-1, 1, 1), np.int64)
    place = node("Slice", [index, past, total], "prompt/place")
    place = node("Unsqueeze", [place, constant([1], np.int64)], "prompt/place/of_row")  # [S, 1]
    indices = [node("Expand", [each, shape], f"prompt/index/{axis}") for axis, each in enumerate((row, head, place))]

    later = node("Greater", [index, place], "prompt/later")  # [S, T]
    penalty = node("Where", [later, constant(MASKED_SCORE, np.float32), constant(0, np.float32)], "prompt/penalty")
    return PromptInputs(
        taken=node("Squeeze", [node("Greater", [new, one], "prompt/several")], "prompt/taken"),
        fits=node("Squeeze", [node("GreaterOrEqual", [room, total], "prompt/enough")], "prompt/fits"),
        places=node("Concat", indices, "prompt/places", axis=3),
        total=total,
        bias=node("Add", [bias, penalty], "prompt/bias"),
    )


def _write_for_prompt(
    graph: GraphBuilder, layer: AttentionLayer, qkv: str, prompt: PromptInputs, outputs: Sequence[str]
) -> None:
    """Quantize the new keys and values into the cache, and attend to what the cache holds.

    The scales of keys belong to the queries as well, and those of values to the context: what is read of the cache is
    converted to float32, not multiplied.
    """
    assert layer.scales is not None, "float32 keys and values need no branch"
    config, name = layer.config, f"{layer.context}/prompt"
    node, constant = graph.node, graph.constant
    width, rest = config.n_embd, 2 * config.n_embd
    context, *present = outputs
    key_scale, value_scale = (
        node("Reshape", [scale, constant([-1], np.int64)], f"{name}/{kind}_scale")  # [D]
        for kind, scale in zip(CACHE_KINDS, layer.scales, strict=True)
    )
    both_scales = node("Concat", [key_scale, value_scale], f"{name}/scales", axis=0)  # [2D]
    query, new = graph.node_with_outputs(
        "Split", [qkv, constant([width, rest], np.int64)], [f"{name}/query", f"{name}/new"], axis=2
    )
    steps = node("Div", [new, both_scales], f"{name}/steps")
    codes = node("QuantizeLinear", [steps, constant(1, np.float32), constant(0, np.int8)], f"{name}/codes")
    heads = constant([0, 0, 2 * config.n_head, config.head_dim], np.int64)
    codes = node("Reshape", [codes, heads], f"{name}/codes/heads")  # [B, S, 2H, D / H]
    codes = node("Transpose", [codes], f"{name}/codes/rows", perm=[0, 2, 1, 3])
    parts = graph.node_with_outputs(
        "Split", [codes], [f"{name}/codes/{kind}" for kind in CACHE_KINDS], axis=1, num_outputs=len(CACHE_KINDS)
    )
    read = []
    for kind, past, part, written in zip(CACHE_KINDS, layer.past, parts, present, strict=True):
        in_place, longer = graph.branch(), graph.branch()
        in_place.node("ScatterND", [past, prompt.places, part], f"{written}/in_place")
        longer.node("Concat", [past, part], f"{written}/longer", axis=2)
        for branch, suffix in ((in_place, "in_place"), (longer, "longer")):
            _declare_cache(branch, config, f"{written}/{suffix}")
        graph.choose(prompt.fits, in_place, longer, [written])
        bounds = [constant([0], np.int64), prompt.total, constant([2], np.int64)]  # start, end, axis
        held = node("Slice", [written, *bounds], f"{name}/{kind}/held")  # [B, H, T, D / H]
        read.append(node("Cast", [held], f"{name}/{kind}", to=TensorProto.FLOAT))
    scaled = node("Mul", [query, key_scale], f"{name}/scaled_query")
    unscaled = node(
        "MultiHeadAttention",
        [scaled, *read, "", "", prompt.bias],
        f"{name}/unscaled",
        domain=MICROSOFT,
        num_heads=config.n_head,
        scale=SCORE_SCALE,
    )
    node("Mul", [unscaled, value_scale], context)
