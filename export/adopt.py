"""A graph that optimum exported -> the same graph as ours to ship: its weights stored as ours, its attention kept.

Three things change, each written by the same code as in a graph of our own: products by a constant matrix take the
package's precision, a tied head and the embedding become one table, and `num_logits_to_keep` cuts what the head
computes. All else, attention above all, stays as the exporter traced it, which is what makes it an independent
reference.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from runtime.config import GPT2Config
from runtime.decoder import Decoder
from runtime.errors import CheckpointError, VerificationError
from runtime.package import CONFIG, LOGITS, Attention, GoldenPrompt, Precision

from .attention import ATTENTION
from .checkpoint import EMBEDDING, HEAD, Checkpoint, fit_vocabulary, read_checkpoint
from .checkpoint_files import Float32Array
from .graph import IR_VERSION, OPSET, build_graph, declare_inputs, declare_outputs, last_positions
from .onnx_builder import GraphBuilder, WeightsFile
from .onnx_export import OnnxExport, read_onnx_export
from .products import PRODUCTS, Tensors

GraphOrigin = Literal["built", "adopted", "optimum"]
"""built: from a checkpoint, by us. adopted: the folder is an export. optimum: from a checkpoint, by optimum."""

ROW_STEPS = 2


@dataclass(frozen=True, slots=True)
class GraphSource:
    """What a package is made from.

    Attributes:
        checkpoint: what the oracle computes with.
        tensors: what the graph is written with.
        write_graph: (config, tensors, precision, weights) -> model; looks each tensor up once.
        attention, opset: of that model.
        tools: versions of what made it, beside those that every package names.
    """

    checkpoint: Checkpoint
    tensors: Mapping[str, Float32Array]
    write_graph: Callable[[GPT2Config, Tensors, Precision, WeightsFile], onnx.ModelProto]
    attention: Attention
    opset: int
    tools: Mapping[str, str]

    def fitted(self, ids: Mapping[str, int]) -> GraphSource:
        """The same with the vocabulary of a tokenizer, token -> id; errors as `checkpoint.fit_vocabulary`."""
        checkpoint = fit_vocabulary(self.checkpoint, ids)
        if checkpoint is self.checkpoint:
            return self
        return replace(self, checkpoint=checkpoint, tensors=checkpoint.tensors)


@contextmanager
def opened(folder: Path, origin: GraphOrigin) -> Iterator[GraphSource]:
    """What `folder` holds, as long as the block lasts.

    Raises:
        CheckpointError: it is damaged, or not supported; or optimum is not installed, or fails.
    """
    if origin == "built":
        checkpoint = read_checkpoint(folder)
        yield GraphSource(checkpoint, checkpoint.tensors, build_graph, ATTENTION, OPSET, {})
    elif origin == "adopted":
        export = read_onnx_export(folder)
        yield _adopted(export, export.checkpoint, {})
    else:
        checkpoint = read_checkpoint(folder)
        with tempfile.TemporaryDirectory(prefix="gpt2-edge-optimum-") as exported:
            tools = export_with_optimum(folder, Path(exported))
            yield _adopted(read_onnx_export(Path(exported)), checkpoint, tools)


def _adopted(export: OnnxExport, checkpoint: Checkpoint, tools: Mapping[str, str]) -> GraphSource:
    if export.checkpoint.config != checkpoint.config:
        raise CheckpointError(f"{checkpoint.folder}: optimum read its config.json otherwise; leave --exporter out")
    return GraphSource(
        checkpoint, export.checkpoint.tensors, partial(adopt_graph, export), "plain", export.opset, tools
    )


def export_with_optimum(folder: Path, into: Path) -> dict[str, str]:
    """Have optimum export a checkpoint, in a process of its own: it prints, warns, and keeps much memory.

    Args:
        folder: the checkpoint, in a layout that transformers reads.
        into: an empty folder, for the export.
    Returns:
        The versions of what made it.
    Raises:
        CheckpointError: transformers does not read this layout; or optimum is not installed, or fails.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: optimum reads Hugging Face's checkpoints only, this has no {CONFIG}")
    try:
        tools = {name: version(name) for name in ("optimum-onnx", "transformers", "torch")}
    except PackageNotFoundError as error:
        raise CheckpointError(
            f"--exporter optimum: {error.name} is not installed; pip install 'gpt2-edge[optimum]'"
        ) from error
    command = [sys.executable, "-m", "optimum.exporters.onnx", "--framework", "pt"]
    command += ["--task", "text-generation-with-past", "--dtype", "fp32", "--opset", "18"]
    done = subprocess.run(
        [*command, "--model", str(folder.resolve()), str(into)],
        cwd=into,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},  # the checkpoint is here
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(f"{folder}: optimum failed to export it ({last}); leave --exporter out")
    return tools


def adopt_graph(
    export: OnnxExport, config: GPT2Config, tensors: Tensors, precision: Precision, weights: WeightsFile
) -> onnx.ModelProto:
    """Write an exported graph anew, and stream its weights to disk.

    Args:
        export: the graph.
        config: its numbers.
        tensors: canonical name -> float32 array, or what `export.calibration` made of it. Each is looked up once, and
            not kept.
        precision: what its constant matrices become.
        weights: receives the weights.
    Returns:
        The model, which names `weights` as its external data.
    Raises:
        CheckpointError: a weight turns out damaged when it is read.
    """
    return _GraphAdopter(export, config, tensors, precision, weights).write()


class _GraphAdopter:
    """The new graph so far."""

    def __init__(
        self, export: OnnxExport, config: GPT2Config, tensors: Tensors, precision: Precision, weights: WeightsFile
    ) -> None:
        self._export = export
        self._config = config
        self._tensors = tensors
        self._products = PRODUCTS[precision]
        self._graph = GraphBuilder(weights)
        self._canonical = {spelled: name for name, spelled in export.spelling.items()}

    def write(self) -> onnx.ModelProto:
        graph = self._graph
        declare_inputs(graph, self._config)
        nodes = self._used_nodes()
        for name in dict.fromkeys(value for node in nodes for value in self._kept_inputs(node)):
            self._keep_constant(name)
        table = self._products.token_table(graph, EMBEDDING, self._tensors[EMBEDDING])
        for node in nodes:
            if node.output[0] == LOGITS:
                if not self._config.tie_word_embeddings:
                    table = self._products.token_table(graph, HEAD, self._tensors[HEAD])
                table.logits(graph, last_positions(graph, self._export.head.hidden), LOGITS)
            elif self._is_embedding(node):
                graph.node("Identity", [table.embed(graph, node.input[1])], node.output[0])
            elif self._is_linear(node):
                self._write_linear(node)
            else:
                graph.append(node)
        declare_outputs(graph, self._config)
        return graph.model(name="gpt2", opset=self._export.opset, ir_version=IR_VERSION, producer="gpt2-edge")

    def _used_nodes(self) -> list[onnx.NodeProto]:
        """Nodes in order, without those that only a replaced one read."""
        used = {output.name for output in self._export.model.graph.output}
        kept = []
        for node in reversed(self._export.model.graph.node):
            if not used.isdisjoint(node.output):
                used.update(self._kept_inputs(node))
                kept.append(node)
        return kept[::-1]

    def _kept_inputs(self, node: onnx.NodeProto) -> list[str]:
        """What a node reads that does not become part of a product or a table."""
        if node.output[0] == LOGITS:
            return [self._export.head.hidden]
        if self._is_embedding(node):
            return [node.input[1]]
        if self._is_linear(node):
            return [node.input[0], *node.input[2:]]
        return list(node.input)

    def _keep_constant(self, name: str) -> None:
        if name in self._canonical:
            values = self._tensors[self._canonical[name]]
            if not isinstance(values, np.ndarray):
                raise CheckpointError(f"{name}: the export uses this matrix in a way of its own; use --precision fp32")
            self._graph.weight(name, values)
        elif name in self._export.constants:
            self._graph.weight(name, self._export.constants.read(name))

    def _is_embedding(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "Gather" and self._canonical.get(node.input[0]) == EMBEDDING and not _attributes(node)

    def _is_linear(self, node: onnx.NodeProto) -> bool:
        """x @ weight, or x @ weight + bias, with one of the blocks' matrices."""
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
        if node.op_type not in ("MatMul", "Gemm") or any(
            plain.get(name) != value for name, value in _attributes(node).items()
        ):
            return False
        return self._canonical.get(node.input[1], "").startswith("h.")

    def _write_linear(self, node: onnx.NodeProto) -> None:
        name = self._canonical[node.input[1]]
        product = self._products.linear(self._graph, name, node.input[0], self._tensors[name])
        bias = [value for value in node.input[2:] if value]
        self._graph.node("Add" if bias else "Identity", [product, *bias], node.output[0])


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """An axis of 0 is what Gather assumes."""
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value for name, value in values.items() if (name, value) != ("axis", 0)}


def check_rows(decoder: Decoder, golden: tuple[GoldenPrompt, ...]) -> None:
    """Hold rows that run together, each at its own length, against the same rows alone.

    A graph of foreign making may read the mask otherwise than its names say, which no single row shows.

    Raises:
        VerificationError: a row's logits depend on its neighbours.
    """
    prompts = [np.array(prompt.prompt_ids, np.int64) for prompt in golden]
    together = decoder.start(batch=len(prompts), capacity=max(map(len, prompts)) + ROW_STEPS)
    alone = [decoder.start(batch=1, capacity=len(prompt) + ROW_STEPS) for prompt in prompts]
    ids: NDArray[np.int64] = np.empty(len(prompts), np.int64)
    for row, prompt in enumerate(prompts):
        together.prefill(row, prompt)
        ids[row] = alone[row].prefill(0, prompt).argmax()
    for _ in range(ROW_STEPS):
        logits = together.decode_step(ids)  # [B, V]
        for row, tolerance in enumerate(prompt.tolerance for prompt in golden):
            expected = alone[row].decode_step(ids[row : row + 1])[0]
            difference = float(np.abs(logits[row] - expected).max())
            if not difference <= tolerance:  # "not <=" because a NaN must not pass
                raise VerificationError(
                    f"rows of different lengths disturb each other in this graph: a logit differs by {difference:.2g} "
                    f"from the same row alone, expected at most {tolerance:.2g}; it reads attention_mask or "
                    "position_ids otherwise than optimum's exports do"
                )
            ids[row] = expected.argmax()
