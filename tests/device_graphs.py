"""Tiny graphs for CUDA and TensorRT, run on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.calibration import calibrate
from export.cuda_graph import build_cuda_graph
from export.half_head import CentredTensors
from export.onnx_builder import WeightsFile
from export.plain_graph import build_plain_graph
from export.stand_in import stand_in_decoder
from export.target import Target
from runtime.config import GPT2Config
from runtime.decoder import Decoder
from runtime.package import Device, Manifest, Needs, Precision, Source
from tests.tiny import tiny_config, tiny_weights

Ids = NDArray[np.int64]
CONFIG = tiny_config()


@dataclass(frozen=True)
class Written:
    path: Path
    decoder: Decoder


def write_device_graph(
    folder: Path,
    device: Device,
    precision: Precision,
    *,
    config: GPT2Config = CONFIG,
    tensors: Mapping[str, Any] | None = None,
    wide_residual: bool = False,
) -> Written:
    target = Target.of(device, precision, None)
    weights: Mapping[str, Any] = CentredTensors(config, tiny_weights(config) if tensors is None else tensors)
    if target.quantized == "int8-static":  # the only one that cannot do without
        ids = np.random.default_rng(1).integers(0, config.n_vocab, (4, config.n_ctx))
        weights = calibrate(config, weights, ids, target.quantized)
    build = build_cuda_graph if device == "cuda" else build_plain_graph
    path = folder / "model.onnx"
    with (folder / "model.onnx_data").open("wb") as file:
        model = partial(build, wide_residual=wide_residual)(
            config, weights, precision, WeightsFile(file, "model.onnx_data")
        )
    path.write_bytes(model.SerializeToString())
    return Written(path, stand_in_decoder(path, _manifest(config, target)))


def _manifest(config: GPT2Config, target: Target) -> Manifest:
    return Manifest(
        config=config,
        precision=target.precision,
        device=target.device,
        attention=target.attention("GroupQueryAttention"),
        kv_cache=target.kv_cache,
        opset=0,
        decode_weight_bytes=1,
        needs=Needs(onnxruntime="1"),
        source=Source(name="", layout="", fingerprint=""),
        recipe={},
        tools={},
        files={},
    )


def run(decoder: Decoder, ids: Ids, mask: Ids, positions: Ids, past: Sequence[NDArray[Any]] = ()) -> list[Any]:
    """The graph without our cache: logits, next ids, then present keys and values."""
    config = decoder.config
    feed: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    names = [f"past_key_values.{layer}.{kind}" for layer in range(config.n_layer) for kind in ("key", "value")]
    empty = np.zeros((len(ids), config.n_head, 0, config.head_dim), np.float16)
    feed |= dict(zip(names, past or [empty] * len(names), strict=True))
    result: list[Any] = decoder.session.run(None, feed)
    return result


def run_row(decoder: Decoder, ids: Ids) -> list[Any]:
    return run(decoder, ids[None], np.ones((1, len(ids)), np.int64), np.arange(len(ids))[None])
