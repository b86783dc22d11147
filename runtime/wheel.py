"""onnxruntime, as it was installed: imported in one place, and what is wrong with the installation."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import packages_distributions, version
from types import ModuleType

from .errors import DeviceError

INSTALL = "one of: pip install 'gpt2-edge[cpu]', pip install 'gpt2-edge[gpu]'"


def load_onnxruntime() -> ModuleType:
    """Import onnxruntime, with its telemetry off unless the application has set ORT_DISABLE_TELEMETRY itself.

    Raises:
        DeviceError: onnxruntime is not installed, its native library does not load, or parts of it are missing.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise DeviceError(f"onnxruntime does not import ({error}); install it again, {INSTALL}") from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise DeviceError(
            "onnxruntime is installed in part, as where one of its two wheels was removed and took files of the other "
            f"along; install it again: pip uninstall -y onnxruntime onnxruntime-gpu, and then {INSTALL}"
        )
    return onnxruntime


def installed_wheels() -> dict[str, str]:
    """The distributions that brought an onnxruntime, and their versions: there should be one."""
    return {name: version(name) for name in sorted(set(packages_distributions().get("onnxruntime", ())))}


def wheels_in_each_others_way() -> str | None:
    """Told where several wheels have written into the same folder: the last one hides what the others can do."""
    wheels = installed_wheels()
    if len(wheels) < 2:
        return None
    return (
        f"{' and '.join(f'{name} {number}' for name, number in wheels.items())} are both installed, and overwrite each "
        f"other's files; keep one: pip uninstall -y {' '.join(wheels)} && pip install 'gpt2-edge[gpu]' (or [cpu])"
    )


def why_without_provider(provider: str) -> str:
    """Why the installed onnxruntime does not know a provider, and what to install."""
    onnxruntime = load_onnxruntime()
    if conflict := wheels_in_each_others_way():
        return conflict
    name = onnxruntime.package_name
    removed = "" if name == "onnxruntime-gpu" else f"pip uninstall -y {name} && "
    return (
        f"the installed {name} {onnxruntime.__version__} was built without {provider}; take the one for NVIDIA's GPUs: "
        f"{removed}pip install 'gpt2-edge[gpu]'"
    )
