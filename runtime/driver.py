"""NVIDIA's driver, asked through its own library: what it supports, and which GPUs there are."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "libcuda.so.1"
COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE, where CUDA_VISIBLE_DEVICES is empty too
KERNEL_MODULE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device of the driver's, in its order, which CUDA_VISIBLE_DEVICES may change."""

    name: str
    memory_bytes: int
    compute_capability: str  # as 8.6


@dataclass(frozen=True, slots=True)
class Driver:
    """What an installed driver says of itself. `fault` is the name of the error that it fails to start with, if any."""

    version: str | None  # of the kernel's module, as 580.95.05
    cuda: tuple[int, int]  # the newest CUDA that it supports
    gpus: tuple[Gpu, ...]
    fault: str | None

    @classmethod
    def here(cls) -> Driver | None:
        """This machine's; None where there is none.

        Source: CUDA driver API (cuDriverGetVersion: 1000 major + 10 minor; cuInit; device management).
        """
        try:
            library = ctypes.CDLL(LIBRARY)
        except OSError:
            return None
        cuda, count = ctypes.c_int(), ctypes.c_int()
        library.cuDriverGetVersion(ctypes.byref(cuda))
        status = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
        hides_all = status == NO_DEVICE
        return cls(
            version=_kernel_module_version(),
            cuda=(cuda.value // 1000, cuda.value % 1000 // 10),
            gpus=tuple(_gpu(library, index) for index in range(count.value)),
            fault=_error_name(library, status) if status and not hides_all else None,
        )

    def __str__(self) -> str:
        return f"{self.version or 'of unknown version'}, CUDA {self.cuda[0]}.{self.cuda[1]}"


def _gpu(library: ctypes.CDLL, index: int) -> Gpu:
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in COMPUTE_CAPABILITY:
        value = ctypes.c_int()
        library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(str(value.value))
    return Gpu(name.value.decode(errors="replace"), memory.value, ".".join(capability))


def _error_name(library: ctypes.CDLL, status: int) -> str:
    """As CUDA_ERROR_NO_DEVICE; the number where the driver has no name for it."""
    name = ctypes.c_char_p()
    library.cuGetErrorName(status, ctypes.byref(name))
    return name.value.decode(errors="replace") if name.value else f"CUDA error {status}"


def _kernel_module_version() -> str | None:
    """The first number with points in what the kernel's module says of itself."""
    try:
        match = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", KERNEL_MODULE.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return match[0] if match else None
