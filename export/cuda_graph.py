"""GPT-2 as an ONNX graph for CUDA: float16, with few and fused kernels.

One token costs little arithmetic, so what counts is how much is read and how often a kernel is started: the sum with
the residual and the norm behind it are one operator, which adds the bias of the product before, too.

Rows are padded on the right, or not at all, as our runtime and onnxruntime-genai do: attention is told each row's
length, and no mask of scores, which would turn its fast kernels off.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from runtime.config import GPT2Config
from runtime.package import (
    ATTENTION_MASK,
    CACHE_KINDS,
    INPUT_IDS,
    NUM_LOGITS_TO_KEEP,
    POSITION_IDS,
    Precision,
    past_name,
    present_name,
)

from .attention import ATTENTION
from .checkpoint import EMBEDDING, HEAD
from .graph import (
    IR_VERSION,
    OPSET,
    check_supported,
    declare_inputs,
    declare_outputs,
    write_activation,
)
from .half_head import write_logits
from .half_writer import HalfWriter
from .onnx_builder import MICROSOFT, WeightsFile
from .products import Tensors


def build_cuda_graph(
    config: GPT2Config, tensors: Tensors, precision: Precision, weights: WeightsFile, *, wide_residual: bool = False
) -> onnx.ModelProto:
    """Build the graph and stream its weights to disk.

    Args:
        config: the model's numbers.
        tensors: as `graph.build_graph` takes them, but with the head around its mean: `half_head.CentredTensors`.
        precision: "fp16", "int8" or "int4".
        weights: receives the weights.
        wide_residual: keep the sum that goes through all layers in float32.
    Returns:
        The model, which names `weights` as its external data.
    Raises:
        ConfigError: as `graph.check_supported`.
        CheckpointError, QuantizationError: a tensor turns out damaged, or beyond float16's range.
    """
    check_supported(config)
    return _CudaWriter(config, tensors, precision, weights, wide_residual=wide_residual).write()


class _CudaWriter(HalfWriter):
    device = "cuda"

    def write(self) -> onnx.ModelProto:
        graph, config = self._graph, self._config
        declare_inputs(graph, config, "float16")
        last_key, total_length = self._read_mask()
        table = self._products.token_table(graph, EMBEDDING, self._tensors[EMBEDDING])
        rows = table.embed(graph, INPUT_IDS)
        positions = graph.node("Gather", [self._half("wpe.weight"), POSITION_IDS], "wpe.weight/rows")
        normed, hidden = self._add_and_norm("h.0.ln_1", rows, self._residual(positions))  # [B, S, D]
        for layer in range(config.n_layer):
            attended = self._attention(layer, normed, last_key, total_length)
            normed, hidden = self._add_and_norm(f"h.{layer}.ln_2", attended, hidden, f"h.{layer}.attn.c_proj.bias")
            after = f"h.{layer + 1}.ln_1" if layer + 1 < config.n_layer else "ln_f"
            normed, hidden = self._add_and_norm(after, self._mlp(layer, normed), hidden, f"h.{layer}.mlp.c_proj.bias")
        if not config.tie_word_embeddings:
            table = self._products.token_table(graph, HEAD, self._tensors[HEAD])
        write_logits(graph, table, self._last_positions(normed), config.n_vocab)
        declare_outputs(graph, config, "float16")
        return graph.model(name="gpt2", opset=OPSET, ir_version=IR_VERSION, producer="gpt2-edge")

    def _read_mask(self) -> tuple[str, str]:
        """The index of each row's last key [B] int32, and P + S, scalar int32, which attention reads on the host."""
        node, constant = self._graph.node, self._graph.constant
        length = node("Shape", [ATTENTION_MASK], "mask/length", start=1, end=2)  # [1]
        total = node("Squeeze", [length], "mask/total")  # scalar
        count = node("ReduceSum", [ATTENTION_MASK, constant([1], np.int64)], "mask/count", keepdims=0)  # [B]
        last = node("Sub", [count, constant(1, np.int64)], "mask/last")
        return (
            node("Cast", [last], "mask/last_key", to=TensorProto.INT32),
            node("Cast", [total], "mask/total_length", to=TensorProto.INT32),
        )

    def _last_positions(self, hidden: str) -> str:
        """As `graph.last_positions`, by S - (S + kept).

        Slice reads on the host where it starts. onnxruntime computes there what comes from a shape, but would negate an
        input on the device and copy it back.
        """
        node, constant = self._graph.node, self._graph.constant
        new = node("Shape", [INPUT_IDS], "kept/new", start=1, end=2)
        start = node("Sub", [new, node("Add", [new, NUM_LOGITS_TO_KEEP], "kept/more")], "kept/start")
        end, axis = constant([np.iinfo(np.int64).max], np.int64), constant([1], np.int64)
        return node("Slice", [hidden, start, end, axis], "kept")

    def _add_and_norm(self, norm: str, branch: str, residual: str, bias: str | None = None) -> tuple[str, str]:
        """Norm of the new residual, branch + residual + bias, and that residual itself."""
        inputs = [
            self._residual(branch),
            residual,
            self._of_residual(f"{norm}.weight"),
            self._of_residual(f"{norm}.bias"),
        ]
        if bias:
            inputs.append(self._of_residual(bias))
        normed, _, _, total = self._graph.node_with_outputs(
            "SkipLayerNormalization",
            inputs,
            [norm, "", "", f"{norm}/residual"],
            domain=MICROSOFT,
            epsilon=self._config.layer_norm_epsilon,
        )
        return self._narrow(normed), total

    def _attention(self, layer: int, normed: str, last_key: str, total_length: str) -> str:
        name = f"h.{layer}.attn"
        qkv = self._product(f"{name}.c_attn", normed)
        qkv = self._graph.node("Add", [qkv, self._half(f"{name}.c_attn.bias")], f"{name}.c_attn")  # [B, S, 3D]
        past = [past_name(layer, kind) for kind in CACHE_KINDS]
        present = [present_name(layer, kind) for kind in CACHE_KINDS]
        context, *_ = self._graph.node_with_outputs(
            ATTENTION,
            [qkv, "", "", *past, last_key, total_length],
            [f"{name}/context", *present],
            domain=MICROSOFT,
            num_heads=self._config.n_head,
            kv_num_heads=self._config.n_head,
            scale=self._config.attention_scale(layer),
        )
        return self._product(f"{name}.c_proj", context)

    def _mlp(self, layer: int, normed: str) -> str:
        name = f"h.{layer}.mlp"
        inner = self._product(f"{name}.c_fc", normed)  # [B, S, n_inner]
        bias = self._half(f"{name}.c_fc.bias")
        return self._product(
            f"{name}.c_proj", write_activation(self._graph, self._config.activation, name, inner, bias)
        )
