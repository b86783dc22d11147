"""Opens the ONNX Runtime session for a device, and proves that this device is what runs."""

from __future__ import annotations

import importlib
import math
import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from .activations import NARROW, WIDE, Activations
from .errors import DeviceError, MachineError, PackageError, RequestError
from .package import Device, Needs

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS: dict[Device, str] = {"cpu": "CPUExecutionProvider"}

X86 = ("x86_64", "amd64")

FATAL_ONLY = 4
"""onnxruntime's log level. An error is raised as well, so it need not be printed too; at the default level each load
warns of `num_logits_to_keep`, an input with a default value."""

MAX_THREADS = 256
"""Threads wait for each other actively: on two processors 64 take 5 s for three tokens, 1,024 more than a minute."""


def load_onnxruntime() -> ModuleType:
    """Import onnxruntime, with its telemetry off unless the application has set ORT_DISABLE_TELEMETRY itself.

    Raises:
        DeviceError: onnxruntime is not installed, or its native library does not load.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise DeviceError(
            f"onnxruntime does not import ({error}); install it again, one of: pip install 'gpt2-edge[cpu]', "
            "pip install 'gpt2-edge[gpu]'"
        ) from error


def open_session(
    model_path: Path,
    *,
    device: Device = "cpu",
    threads: int | None = None,
    activations: Activations = WIDE,
    optimized: bool = False,
) -> onnxruntime.InferenceSession:
    """Open a graph on the device that was asked for, and on no other.

    Args:
        model_path: the .onnx file, its weights beside it.
        device: "cpu"; the others are refused until this runtime can prove them.
        threads: worker threads; None takes `available_processors()`.
        activations: what an int8 graph rounds its activations to, see `activations_here`.
        optimized: the graph is one that `save_optimized` wrote: it is run as it stands.
    Raises:
        DeviceError: the device is not what would run.
        RequestError: threads is not 1 to MAX_THREADS.
        PackageError: onnxruntime refuses the file.
        MachineError: memory ran out.
    """
    if device not in PROVIDERS:
        raise DeviceError(
            f"device {device!r} is not supported by this version, expected cpu; convert for the cpu, and load it there"
        )
    n_threads = checked_threads(threads)
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = n_threads
    if activations != WIDE:
        for name, value in _overrides(activations).items():
            options.add_initializer(name, value)
    if optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _open(model_path, PROVIDERS[device], options)


@cache
def _overrides(activations: Activations) -> Mapping[str, Any]:
    """OrtValues by initializer; kept, since sessions read them for as long as they live."""
    as_value = load_onnxruntime().OrtValue.ortvalue_from_numpy
    return {name: as_value(np.asarray(value)) for name, value in activations.values().items()}


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
    _open(model_path, PROVIDERS["cpu"], options)


def _open(model_path: Path, provider: str, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    ort = load_onnxruntime()
    options.inter_op_num_threads = 1
    options.log_severity_level = FATAL_ONLY
    try:
        session = ort.InferenceSession(str(model_path), options, providers=[provider], enable_fallback=0)
    except Exception as error:
        reason = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "bad_alloc" in reason or "Failed to allocate" in reason:
            raise MachineError(f"{model_path}: out of memory while loading ({reason})") from error
        raise PackageError(f"{model_path}: onnxruntime {ort.__version__} refuses it ({reason})") from error
    if session.get_providers() != [provider]:
        raise DeviceError(f"asked onnxruntime for {provider} alone, it runs {session.get_providers()}")
    return session


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


def check_needs(needs: Needs, *, device: Device) -> None:
    """Refuse a package that this onnxruntime cannot run, or whose arithmetic this processor would get wrong.

    Raises:
        DeviceError: as `unmet_needs` says.
    """
    if unmet := unmet_needs(needs, device=device, onnxruntime=load_onnxruntime().__version__):
        raise DeviceError("; ".join(unmet))


def unmet_needs(needs: Needs, *, device: Device, onnxruntime: str | None) -> list[str]:
    """Each need that this machine does not meet, and what to do; what cannot be told counts as met.

    Args:
        needs: the package's.
        device: where it would run.
        onnxruntime: the installed version, None where nobody knows.
    """
    unmet = []
    if onnxruntime is not None and _version(onnxruntime) < _version(needs.onnxruntime):
        unmet.append(
            f"this package needs onnxruntime {needs.onnxruntime} or newer, installed is {onnxruntime}; update it with: "
            "pip install --upgrade onnxruntime"
        )
    if device == "cpu" and not needs.narrows and _lacks_features(needs):
        unmet.append(
            f"this package needs a processor with one of {', '.join(needs.processor)}, this one "
            f"({platform.machine()}) has none, and its results would be wrong; convert again, since int8 packages of "
            "today run here, or convert with --precision fp32"
        )
    return unmet


def activations_here(needs: Needs) -> Activations:
    """What a package's activations are to be rounded to on this processor.

    Where the system does not tell what an x86 processor has, it is what is safe on all of them; other processors are
    taken to have what is needed there.
    """
    unknown_x86 = processor_features() is None and platform.machine().lower() in X86
    return NARROW if needs.narrows and (unknown_x86 or _lacks_features(needs)) else WIDE


def _lacks_features(needs: Needs) -> bool:
    have = processor_features()
    return bool(needs.processor) and have is not None and have.isdisjoint(needs.processor)


def _version(text: str) -> tuple[int, ...]:
    """1.23.2 -> (1, 23, 2); what is no number (a development build's suffix) counts as 0."""
    return tuple(int(part) if part.isdigit() else 0 for part in text.split(".")[:3])


def processor_features() -> frozenset[str] | None:
    """Feature flags as Linux names them; None where no /proc/cpuinfo tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return None


def available_processors() -> int:
    """Processors that this process may use: its affinity mask, cut to the quota of its control group.

    The host's count would be wrong in a container: threads beyond the quota only wait for each other.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _control_group_quota()
    return allowed if quota is None else max(1, min(allowed, math.floor(quota)))


def _control_group_quota(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float | None:
    """Processors' worth of time that the control group may use, the tightest limit on the way up; None: no limit.

    Source: Linux, Documentation/admin-guide/cgroup-v2 (cpu.max: "quota period") and cgroup-v1 (cpu.cfs_quota_us).
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            quota = _quota_of(folder)
            if quota is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _quota_of(folder: Path) -> float | None:
    """The quota that one control group's folder states."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8").strip()
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return None
