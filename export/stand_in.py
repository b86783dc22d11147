"""The CPU in place of another device: it has all operators of a package's graph, and so a conversion needs no GPU.

What it shows is that the graph is the model. It does not show the device's own rounding, kernels or overflows.
"""

from __future__ import annotations

from pathlib import Path

from runtime.decoder import Decoder
from runtime.package import Manifest
from runtime.session import FATAL_ONLY, available_processors, load_onnxruntime


def stand_in_decoder(model_path: Path, manifest: Manifest) -> Decoder:
    """Open a graph that was made for another device on the CPU.

    onnxruntime is not to look for int8 products in it: it would find none for float16, and dequantize each matrix anew
    at every run instead of once.
    """
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = available_processors(), 1
    options.log_severity_level = FATAL_ONLY
    options.add_session_config_entry(
        "session.disable_quant_qdq", "1"
    )  # Source: onnxruntime_session_options_config_keys.h
    session = ort.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
    return Decoder(session, manifest.config, manifest.attention, manifest.kv_cache)
