"""GPT-2 as an ONNX graph for TensorRT: float16, of ONNX's own operators.

TensorRT compiles the graph for the shapes of a profile, and fuses by itself. Attention is spelled out, on keys and
values that grow from run to run; hidden keys get a finite score, so that any padding is served and a row of nothing
but padding spreads no NaN. All positions have logits: how many are wanted would be one more shape to compile for.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from runtime.config import GPT2Config
from runtime.package import ATTENTION_MASK, CACHE_KINDS, INPUT_IDS, POSITION_IDS, Precision, past_name, present_name

from .checkpoint import EMBEDDING, HEAD
from .graph import IR_VERSION, declare_inputs, declare_outputs
from .half_head import write_logits
from .half_writer import HalfWriter
from .onnx_builder import WeightsFile
from .products import Tensors

PLAIN_OPSET = 20
"""The newest that the parser of TensorRT 10 reads."""

MASKED_SCORE = -30_000.0
"""Added to the score of a key that the mask hides. float16 ends at 65,504, and `half_range` refuses scores above
16,376: their sum stays finite."""


def build_plain_graph(
    config: GPT2Config, tensors: Tensors, precision: Precision, weights: WeightsFile, *, wide_residual: bool = False
) -> onnx.ModelProto:
    """Build the graph and stream its weights to disk.

    Args:
        config: the model's numbers.
        tensors: as `graph.build_graph` takes them, but with the head around its mean: `half_head.CentredTensors`.
        precision: "fp16" or "int8".
        weights: receives the weights.
        wide_residual: keep the sum that goes through all layers in float32.
    Returns:
        The model, which names `weights` as its external data.
    Raises:
        CheckpointError, QuantizationError: a tensor turns out damaged, or beyond float16's range.
    """
    return _PlainWriter(config, tensors, precision, weights, wide_residual=wide_residual).write()


class _PlainWriter(HalfWriter):
    device = "tensorrt"

    def write(self) -> onnx.ModelProto:
        graph, config = self._graph, self._config
        declare_inputs(graph, config, "float16", all_logits=True)
        mask = self._read_mask()
        table = self._products.token_table(graph, EMBEDDING, self._tensors[EMBEDDING])
        rows = self._residual(table.embed(graph, INPUT_IDS))
        positions = self._residual(graph.node("Gather", [self._half("wpe.weight"), POSITION_IDS], "wpe.weight/rows"))
        hidden = graph.node("Add", [rows, positions], "embedding")  # [B, S, D]
        for layer in range(config.n_layer):
            attended = self._residual(self._attention(layer, hidden, mask))
            hidden = graph.node("Add", [hidden, attended], f"h.{layer}/attn/residual")
            hidden = graph.node("Add", [hidden, self._residual(self._mlp(layer, hidden))], f"h.{layer}/mlp/residual")
        normed = self._layer_norm("ln_f", hidden)
        if not config.tie_word_embeddings:
            table = self._products.token_table(graph, HEAD, self._tensors[HEAD])
        write_logits(graph, table, normed, config.n_vocab)
        declare_outputs(graph, config, "float16")
        return graph.model(name="gpt2", opset=PLAIN_OPSET, ir_version=IR_VERSION, producer="gpt2-edge", domains=("",))

    def _read_mask(self) -> str:
        """What is added to the scores [B, 1, S, P + S]: a token sees itself and what the mask shows before it."""
        node, constant = self._graph.node, self._graph.constant
        zero, one = constant(0, np.int64), constant(1, np.int64)
        new = node("Squeeze", [node("Shape", [INPUT_IDS], "mask/new", start=1, end=2)], "mask/n_new")
        total = node("Squeeze", [node("Shape", [ATTENTION_MASK], "mask/total", start=1, end=2)], "mask/n_total")
        keys = node("Range", [zero, total, one], "mask/keys")  # [T]
        queries = node("Range", [node("Sub", [total, new], "mask/n_past"), total, one], "mask/queries")  # [S]
        column = node("Unsqueeze", [queries, constant([1], np.int64)], "mask/query_column")  # [S, 1]
        past = node("LessOrEqual", [keys, column], "mask/past")  # [S, T]
        given = node("Cast", [ATTENTION_MASK], "mask/given", to=TensorProto.BOOL)
        shown = node("Unsqueeze", [given, constant([1, 2], np.int64)], "mask/shown")  # [B, 1, 1, T]
        visible = node("And", [past, shown], "mask/visible")  # [B, 1, S, T]
        return node("Where", [visible, constant(0, np.float16), constant(MASKED_SCORE, np.float16)], "mask/bias")

    def _attention(self, layer: int, hidden: str, mask: str) -> str:
        """softmax(scale q k^T + mask) v of each head."""
        name, node = f"h.{layer}.attn", self._graph.node
        qkv = self._linear(f"{name}.c_attn", self._layer_norm(f"h.{layer}.ln_1", hidden))  # [B, S, 3D]
        parts = self._graph.node_with_outputs(
            "Split", [qkv], [f"{name}/{part}" for part in ("query", *CACHE_KINDS)], axis=-1, num_outputs=3
        )
        query, *new = (self._heads(part) for part in parts)
        keys, values = (
            node("Concat", [past_name(layer, kind), part], present_name(layer, kind), axis=2)
            for kind, part in zip(CACHE_KINDS, new, strict=True)
        )  # [B, H, T, head_dim]
        scale = self._graph.constant(self._config.attention_scale(layer), np.float16)
        columns = node("Transpose", [keys], f"{name}/key_columns", perm=[0, 1, 3, 2])
        scores = node("MatMul", [node("Mul", [query, scale], f"{name}/scaled_query"), columns], f"{name}/scores")
        weights = node("Softmax", [node("Add", [scores, mask], f"{name}/masked_scores")], f"{name}/weights", axis=-1)
        context = node("MatMul", [weights, values], f"{name}/head_contexts")  # [B, H, S, head_dim]
        rows = node("Transpose", [context], f"{name}/context_rows", perm=[0, 2, 1, 3])
        shape = self._graph.constant([0, 0, self._config.n_embd], np.int64)
        return self._linear(f"{name}.c_proj", node("Reshape", [rows, shape], f"{name}/context"))

    def _heads(self, x: str) -> str:
        """[B, S, D] as [B, H, S, head_dim]."""
        shape = self._graph.constant([0, 0, self._config.n_head, self._config.head_dim], np.int64)
        split = self._graph.node("Reshape", [x, shape], f"{x}/split")
        return self._graph.node("Transpose", [split], f"{x}/heads", perm=[0, 2, 1, 3])

    def _mlp(self, layer: int, hidden: str) -> str:
        name = f"h.{layer}.mlp"
        inner = self._linear(f"{name}.c_fc", self._layer_norm(f"h.{layer}.ln_2", hidden))  # [B, S, n_inner]
        return self._linear(f"{name}.c_proj", self._activation(name, inner))

    def _activation(self, name: str, x: str) -> str:
        node = self._graph.node
        match self._config.activation:
            case "gelu_new":
                return node("Gelu", [x], f"{name}/activation", approximate="tanh")
            case "gelu":
                return node("Gelu", [x], f"{name}/activation")
            case "relu":
                return node("Relu", [x], f"{name}/activation")
            case "silu":
                return node("Mul", [x, node("Sigmoid", [x], f"{name}/gate")], f"{name}/activation")

    def _linear(self, name: str, x: str) -> str:
        return self._graph.node("Add", [self._product(name, x), self._half(f"{name}.bias")], name)

    def _layer_norm(self, name: str, x: str) -> str:
        """Norm of the residual."""
        inputs = [x, self._of_residual(f"{name}.weight"), self._of_residual(f"{name}.bias")]
        epsilon = self._config.layer_norm_epsilon
        return self._narrow(self._graph.node("LayerNormalization", inputs, name, axis=-1, epsilon=epsilon))
