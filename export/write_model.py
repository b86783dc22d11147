"""Graph and weights of a package: measured, quantized and streamed to disk, each tensor as it is looked up."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import onnx

from runtime.activations import NARROW, NARROW_RECIPE
from runtime.config import GPT2Config
from runtime.decoder import Decoder
from runtime.needs import activations_here, check_needs
from runtime.package import MODEL_FILES, WEIGHTS_SUFFIX, FileEntry, Precision

from .adopt import GraphSource
from .calibration import calibrate
from .calibration_text import SEQUENCES, Ids, own_text
from .checkpoint_files import Float32Array
from .cuda_graph import build_cuda_graph
from .download import Progress
from .fingerprint import FingerprintedTensors
from .half_head import CentredTensors
from .half_range import measure_range
from .onnx_builder import WeightsFile
from .plain_graph import build_plain_graph
from .products import Tensors
from .step_weights import decode_weight_bytes
from .target import Target

GraphWriter: TypeAlias = "Callable[[GPT2Config, Tensors, Precision, WeightsFile], onnx.ModelProto]"

WRITING = Target.of("cpu", "int8", None)
"""What writes a text to calibrate on."""


@dataclass(frozen=True, slots=True)
class WrittenModel:
    """What is known of graph and weights once they are on disk; nothing needs to be read again."""

    weights: FileEntry
    decode_weight_bytes: int
    opset: int
    fingerprint: str  # of the source
    recipe: Mapping[str, str]


def write_model(
    staging: Path, source: GraphSource, target: Target, prompts: Sequence[Ids], *, text: Ids | None, progress: Progress
) -> WrittenModel:
    """Write a package's graph and weights.

    Args:
        staging: the package's folder.
        source: the checkpoint, and who writes its graph for the CPU.
        target: what it becomes.
        prompts: text whose numbers float16 must hold, where it is to.
        text: what quantization is measured on; where this is None, the model writes one.
        progress: called as the work goes on.
    Raises:
        CheckpointError, QuantizationError: the checkpoint is damaged, or not supported.
    """
    model_path, config = staging / MODEL_FILES[target.precision], source.checkpoint.config
    model_path.parent.mkdir()
    stored = FingerprintedTensors(source.tensors, lambda done: progress("weights", done, config.parameter_count))
    tensors: Mapping[str, Float32Array] = stored
    recipe, write_graph = target.recipe(), source.write_graph
    if target.device != "cpu":
        measured = measure_range(config, stored, prompts)
        recipe["range"] = measured.recipe()
        tensors = CentredTensors(config, stored)
        write_graph = _device_graph(target, wide_residual=measured.wide_residual)
    elif activations_here(target.needs()) == NARROW:
        recipe[NARROW_RECIPE] = "verified with activations of 7 bits, as this processor takes them"
    quantized: Tensors = tensors
    if target.quantized:
        ids = _own_text(staging, source, stored, SEQUENCES[target.precision], progress) if text is None else text
        quantized = calibrate(
            config,
            tensors,
            ids,
            target.quantized,
            lambda done, total: progress("calibration", done, total),
            kv_cache=target.kv_cache,
        )
        text_source = "that the model wrote" if text is None else "of a text that was given"
        recipe["calibration"] = f"calibrated on {ids.size:,} tokens {text_source}"
    model, entry = _write_files(model_path, partial(write_graph, config, quantized, target.precision))
    return WrittenModel(entry, decode_weight_bytes(model), _opset(model), stored.fingerprint(), recipe)


def _device_graph(target: Target, *, wide_residual: bool) -> GraphWriter:
    """Who writes the graph of a device that computes in float16."""
    build = build_cuda_graph if target.device == "cuda" else build_plain_graph
    return partial(build, wide_residual=wide_residual)


def _own_text(staging: Path, source: GraphSource, tensors: Tensors, sequences: int, progress: Progress) -> Ids:
    """Have a plain int8 graph write a text, and remove it."""
    check_needs(WRITING.needs(), device="cpu")
    with tempfile.TemporaryDirectory(dir=staging) as folder:
        model_path, config = Path(folder) / "model.onnx", source.checkpoint.config
        _write_files(model_path, partial(source.write_graph, config, tensors, WRITING.precision))
        decoder = Decoder.open(
            model_path, config, attention=source.attention, activations=activations_here(WRITING.needs())
        )
        return own_text(decoder, sequences, lambda done, total: progress("text", done, total))


def _write_files(
    model_path: Path, write_graph: Callable[[WeightsFile], onnx.ModelProto]
) -> tuple[onnx.ModelProto, FileEntry]:
    """Write graph and weights; the graph, and the weights file's entry."""
    location = model_path.name + WEIGHTS_SUFFIX
    with (model_path.parent / location).open("wb") as file:
        weights = WeightsFile(file, location)
        model = write_graph(weights)
    model_path.write_bytes(model.SerializeToString(deterministic=True))
    return model, weights.entry()


def _opset(model: onnx.ModelProto) -> int:
    return int(next(opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")))
