"""GPT-2 as an ONNX graph for the CPU, written node by node from the weights: no tracing, no torch.

`export.cuda_graph` and `export.plain_graph` write it for other devices, with the same inputs and outputs. One graph
serves a single sequence, left-padded and right-padded batches, pieces of a prompt, and rows of different
lengths in a cache buffer that is longer than what it holds. The weights are taken from the checkpoint in the order in
which the graph uses them, and are on disk before the next is read.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto

from quantization.recipes import cache_scale_name
from runtime.config import Activation, GPT2Config
from runtime.errors import ConfigError
from runtime.package import (
    ATTENTION_MASK,
    CACHE_KINDS,
    INPUT_IDS,
    LOGITS,
    NEXT_IDS,
    NUM_LOGITS_TO_KEEP,
    POSITION_IDS,
    CacheType,
    Precision,
    past_name,
    present_name,
)

from .attention import ATTENTION, AttentionInputs, AttentionLayer, read_mask, write_attention
from .onnx_builder import MICROSOFT, GraphBuilder, WeightsFile
from .products import PRODUCTS, Tensors
from .queries import ScaledQueries

OPSET = 21
IR_VERSION = 10
HEAD_DIM_STEP = 8
"""Numbers; onnxruntime's GroupQueryAttention takes heads of 8, 16, 24 ... and refuses others at the first run only."""

BATCH, NEW, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {NEW}"
"""Axis names that other clients read: transformers.js takes a batch axis of any other name as empty."""


def build_graph(config: GPT2Config, tensors: Tensors, precision: Precision, weights: WeightsFile) -> onnx.ModelProto:
    """Build the graph and stream its weights to disk.

    Args:
        config: the model's numbers.
        tensors: canonical name -> float32 array, as `export.checkpoint` reads them, or what `export.calibration` made
            of it. Each is looked up once, and not kept.
        precision: what becomes of matrices that are float32, see `export.products`.
        weights: receives the weights.
    Returns:
        The model, which names `weights` as its external data.
    Raises:
        ConfigError: as `check_supported`.
        CheckpointError: a tensor turns out damaged when it is read.
    """
    check_supported(config)
    return _GraphWriter(config, tensors, precision, weights).write()


def check_supported(config: GPT2Config) -> None:
    """Refuse what no graph can be built for.

    Raises:
        ConfigError: the heads are of a width that the attention operator does not take.
    """
    if config.head_dim % HEAD_DIM_STEP:
        raise ConfigError(
            f"heads of n_embd / n_head = {config.n_embd} / {config.n_head} = {config.head_dim} numbers are not "
            f"supported, expected a multiple of {HEAD_DIM_STEP}, which onnxruntime's {ATTENTION} takes"
        )


def input_shapes(config: GPT2Config, kv_cache: CacheType = "float32") -> dict[str, tuple[int, list[int | str]]]:
    """The inputs that a client must feed: name -> (type, axes)."""
    cache = {past_name(layer, kind): _cache_value(config, PAST, kv_cache) for layer, kind in _cache_tensors(config)}
    return {
        INPUT_IDS: (TensorProto.INT64, [BATCH, NEW]),
        ATTENTION_MASK: (TensorProto.INT64, [BATCH, TOTAL]),
        POSITION_IDS: (TensorProto.INT64, [BATCH, NEW]),
        **cache,
    }


def output_shapes(config: GPT2Config, kv_cache: CacheType = "float32") -> dict[str, tuple[int, list[int | str]]]:
    """The outputs: name -> (type, axes). A float16 graph is one for a GPU, and chooses ids there."""
    cache = {present_name(layer, kind): _cache_value(config, TOTAL, kv_cache) for layer, kind in _cache_tensors(config)}
    chosen: dict[str, tuple[int, list[int | str]]] = {NEXT_IDS: (TensorProto.INT64, [BATCH, NEW])}
    return {
        LOGITS: (TensorProto.FLOAT, [BATCH, NEW, config.n_vocab]),
        **(chosen if kv_cache == "float16" else {}),
        **cache,
    }


def declare_inputs(
    graph: GraphBuilder, config: GPT2Config, kv_cache: CacheType = "float32", *, all_logits: bool = False
) -> None:
    """Declare them; a graph that always gives all logits has no input that says how many to keep."""
    for name, (dtype, shape) in input_shapes(config, kv_cache).items():
        graph.input(name, dtype, shape)
    if all_logits:
        return
    # An input that is an initializer too has a default: clients that never heard of it get all logits.
    graph.weight(graph.input(NUM_LOGITS_TO_KEEP, TensorProto.INT64, [1]), np.zeros(1, np.int64))


def declare_outputs(graph: GraphBuilder, config: GPT2Config, kv_cache: CacheType = "float32") -> None:
    for name, (dtype, shape) in output_shapes(config, kv_cache).items():
        graph.output(name, dtype, shape)


def last_positions(graph: GraphBuilder, hidden: str) -> str:
    """The last `num_logits_to_keep` of hidden [B, S, D]; a start of -0 keeps all."""
    start = graph.node("Neg", [NUM_LOGITS_TO_KEEP], "kept/start")
    end, axis = graph.constant([np.iinfo(np.int64).max], np.int64), graph.constant([1], np.int64)
    return graph.node("Slice", [hidden, start, end, axis], "kept")


def write_activation(graph: GraphBuilder, activation: Activation, name: str, x: str, bias: str) -> str:
    """activation(x + bias). Some operators add the bias themselves."""
    match activation:
        case "gelu_new":
            return graph.node("FastGelu", [x, bias], f"{name}/activation", domain=MICROSOFT)
        case "gelu":
            return graph.node("BiasGelu", [x, bias], f"{name}/activation", domain=MICROSOFT)
        case "relu":
            return graph.node("Relu", [graph.node("Add", [x, bias], f"{name}/biased")], f"{name}/activation")
        case "silu":
            biased = graph.node("Add", [x, bias], f"{name}/biased")
            return graph.node("Mul", [biased, graph.node("Sigmoid", [biased], f"{name}/gate")], f"{name}/activation")


def _cache_tensors(config: GPT2Config) -> list[tuple[int, str]]:
    return [(layer, kind) for layer in range(config.n_layer) for kind in CACHE_KINDS]


CACHE_DTYPES: Mapping[CacheType, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
}


def _cache_value(config: GPT2Config, length: str, kv_cache: CacheType) -> tuple[int, list[int | str]]:
    return CACHE_DTYPES[kv_cache], [BATCH, config.n_head, length, config.head_dim]


class _GraphWriter:
    """The graph so far. Each method appends a part and returns the name of its result."""

    def __init__(self, config: GPT2Config, tensors: Tensors, precision: Precision, weights: WeightsFile) -> None:
        self._config = config
        self._tensors = ScaledQueries(config, tensors)
        self._products = PRODUCTS[precision]
        self._graph = GraphBuilder(weights)
        self._kv_cache: CacheType = "int8" if cache_scale_name(0, CACHE_KINDS[0]) in tensors else "float32"

    def write(self) -> onnx.ModelProto:
        graph, config = self._graph, self._config
        declare_inputs(graph, config, self._kv_cache)
        mask = read_mask(graph, config, int8_cache=self._kv_cache == "int8")
        table = self._products.token_table(graph, "wte.weight", self._tensors["wte.weight"])
        rows = table.embed(graph, INPUT_IDS)
        positions = graph.node("Gather", [self._weight("wpe.weight"), POSITION_IDS], "wpe.weight/rows")
        hidden = graph.node("Add", [rows, positions], "embedding")  # [B, S, D]
        for layer in range(config.n_layer):
            hidden = graph.node("Add", [hidden, self._attention(layer, hidden, mask)], f"h.{layer}/attn/residual")
            hidden = graph.node("Add", [hidden, self._mlp(layer, hidden)], f"h.{layer}/mlp/residual")
        hidden = self._layer_norm("ln_f", last_positions(graph, hidden))
        if not config.tie_word_embeddings:
            table = self._products.token_table(graph, "lm_head.weight", self._tensors["lm_head.weight"])
        table.logits(graph, hidden, LOGITS)
        declare_outputs(graph, config, self._kv_cache)
        return graph.model(name="gpt2", opset=OPSET, ir_version=IR_VERSION, producer="gpt2-edge")

    def _attention(self, layer: int, hidden: str, mask: AttentionInputs) -> str:
        name = f"h.{layer}.attn"
        qkv = self._linear_with_bias(f"{name}.c_attn", self._layer_norm(f"h.{layer}.ln_1", hidden))  # [B, S, 3D]
        scales = None
        if self._kv_cache == "int8":
            key, value = (self._weight(cache_scale_name(layer, kind)) for kind in CACHE_KINDS)
            scales = key, value
        context = write_attention(self._graph, AttentionLayer(self._config, layer, scales), qkv, mask)
        return self._linear_with_bias(f"{name}.c_proj", context)

    def _mlp(self, layer: int, hidden: str) -> str:
        name = f"h.{layer}.mlp"
        inner = self._linear(f"{name}.c_fc", self._layer_norm(f"h.{layer}.ln_2", hidden))  # [B, S, n_inner]
        active = write_activation(self._graph, self._config.activation, name, inner, self._weight(f"{name}.c_fc.bias"))
        return self._linear_with_bias(f"{name}.c_proj", active)

    def _linear(self, name: str, x: str) -> str:
        return self._products.linear(self._graph, f"{name}.weight", x, self._tensors[f"{name}.weight"])

    def _linear_with_bias(self, name: str, x: str) -> str:
        return self._graph.node("Add", [self._linear(name, x), self._weight(f"{name}.bias")], name)

    def _layer_norm(self, name: str, x: str) -> str:
        """Add and LayerNormalization apart: the fused SkipLayerNormalization took three times as long on a prompt."""
        inputs = [x, self._weight(f"{name}.weight"), self._weight(f"{name}.bias")]
        return self._graph.node("LayerNormalization", inputs, name, axis=-1, epsilon=self._config.layer_norm_epsilon)

    def _weight(self, name: str) -> str:
        values = self._tensors[name]
        assert isinstance(values, np.ndarray), "only matrices are quantized"
        return self._graph.weight(name, values)
