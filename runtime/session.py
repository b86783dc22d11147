"""Opens the ONNX Runtime session at a place, and proves that this place is where it runs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .activations import WIDE, Activations
from .errors import DeviceError, MachineError, PackageError, RequestError
from .place import CPU, Place
from .processor import available_processors
from .provider import PROVIDERS, provider_options, why_not
from .receipt import RECORD, Receipt, prove
from .wheel import load_onnxruntime

if TYPE_CHECKING:
    import onnxruntime

FATAL_ONLY = 4
"""onnxruntime's log level. An error is raised as well, so it need not be printed too; at the default level each load
warns of `num_logits_to_keep`, an input with a default value."""

MAX_THREADS = 256
"""Threads wait for each other actively: on two processors 64 take 5 s for three tokens, 1,024 more than a minute."""

OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate", "out of memory", "OUT_OF_MEMORY")


@dataclass(frozen=True, slots=True)
class Opened:
    """A session, and where it was proven to run."""

    session: onnxruntime.InferenceSession
    receipt: Receipt


def open_session(
    model_path: Path,
    *,
    place: Place = CPU,
    threads: int | None = None,
    activations: Activations = WIDE,
    optimized: bool = False,
    takes_turns: bool = False,
    provider_settings: Mapping[str, str] | None = None,
) -> Opened:
    """Open a graph at the place that was asked for, and nowhere else.

    Args:
        model_path: the .onnx file, its weights beside it.
        place: the device, and which one of several.
        threads: worker threads; None takes `available_processors()`.
        activations: what an int8 graph rounds its activations to, see `activations_here`.
        optimized: the graph is one that `save_optimized` wrote: it is run as it stands.
        takes_turns: another session of this process runs between its runs. Else its worker threads wait actively for
            the next run, and take the processors from the other one meanwhile.
        provider_settings: options of the provider beside those of `provider_options`, as onnxruntime names them.
    Raises:
        DeviceError: the place cannot be had, with what is missing; or nodes would run elsewhere, with their names.
        RequestError: threads is not 1 to MAX_THREADS.
        PackageError: onnxruntime refuses the file.
        MachineError: memory ran out.
    """
    n_threads = checked_threads(threads)
    if fault := why_not(place):
        raise DeviceError(f"{place} cannot run here: {fault}")
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = n_threads
    if activations != WIDE:
        for name, value in _overrides(activations).items():
            options.add_initializer(name, value)
    if takes_turns:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _open(model_path, place, options, provider_settings or {})


@cache
def _overrides(activations: Activations) -> Mapping[str, Any]:
    """OrtValues by initializer; kept, since sessions read them for as long as they live."""
    as_value = load_onnxruntime().OrtValue.ortvalue_from_numpy
    return {name: as_value(np.asarray(value)) for name, value in activations.values().items()}


@cache
def giving_back() -> onnxruntime.RunOptions:
    """Options of a run that gives the arena's memory back when it ends.

    The arena keeps memory from run to run: 774M int8 40 to 50 MB behind a prompt of 900 tokens. Without an
    arena the C library kept 200 MB more there with int8 keys and values, or gave all back after each run and took it
    anew page by page: a fifth of a short prompt's time.
    """
    options = load_onnxruntime().RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def save_optimized(model_path: Path, target: Path) -> None:
    """Have onnxruntime write a graph as it would run it here, its weights rearranged for this processor beside it.

    Args:
        model_path: the .onnx file, its weights beside it.
        target: the .onnx file to write; the weights go to the same name with `_data` behind.
    Raises:
        PackageError: onnxruntime refuses the file, or cannot write the other.
        MachineError: memory ran out.
    """
    options = load_onnxruntime().SessionOptions()
    options.intra_op_num_threads = available_processors()
    options.optimized_model_filepath = str(target)
    # Source: onnxruntime_session_options_config_keys.h
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{target.name}_data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    _open(model_path, CPU, options, {})


def _open(
    model_path: Path, place: Place, options: onnxruntime.SessionOptions, provider_settings: Mapping[str, str]
) -> Opened:
    ort = load_onnxruntime()
    options.inter_op_num_threads = 1
    options.log_severity_level = FATAL_ONLY
    options.add_session_config_entry(*RECORD)
    provider = PROVIDERS[place.device], {**provider_options(place), **provider_settings}
    with ExitStack() as stack:
        graph = _optimized_graph(stack) if place.device == "cuda" else None
        if graph:
            options.optimized_model_filepath = str(graph)
        try:
            session = ort.InferenceSession(str(model_path), options, providers=[provider], enable_fallback=0)
        except Exception as error:
            raise _explained(error, model_path, place) from error
        return Opened(session, prove(session, place, graph))


def _optimized_graph(stack: ExitStack) -> Path | None:
    """Where onnxruntime is to write the graph as it runs: without the weights, whose place in their file it repeats.

    None where there is no folder for temporary files. 774M int8 takes 4 MB, and no more time than loads differ by.
    TensorRT's nodes are compiled, and it is not known here whether onnxruntime can write them.
    """
    try:
        return Path(stack.enter_context(tempfile.TemporaryDirectory())) / "graph.onnx"
    except OSError:
        return None


def _explained(error: Exception, model_path: Path, place: Place) -> DeviceError | MachineError | PackageError:
    """What it means that onnxruntime did not open a session."""
    reason = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(sign in reason for sign in OUT_OF_MEMORY):
        return MachineError(f"{model_path}: out of memory while loading ({reason})")
    if place.device != "cpu" and ("failure" in reason or "Please install" in reason):
        return DeviceError(
            f"{place} does not start ({reason}); python -m runtime.devices tells what this machine can do"
        )
    return PackageError(f"{model_path}: onnxruntime {load_onnxruntime().__version__} refuses it ({reason})")


def checked_threads(threads: int | None) -> int:
    """A number of worker threads; None takes `available_processors()`.

    Raises:
        RequestError: it is not 1 to MAX_THREADS.
    """
    if threads is None:
        return available_processors()
    if type(threads) is not int or not 1 <= threads <= MAX_THREADS:
        raise RequestError(f"threads is {threads!r}, expected a whole number from 1 to {MAX_THREADS}")
    return threads
