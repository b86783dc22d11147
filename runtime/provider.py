"""onnxruntime's providers: which one a device means, with which options, and why it cannot be had here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .driver import LIBRARY, Driver
from .package import Device
from .place import Place
from .shared_libraries import library_versions, missing_libraries
from .wheel import load_onnxruntime, why_without_provider

CPU_PROVIDER = "CPUExecutionProvider"
PROVIDERS: Mapping[Device, str] = {
    "cpu": CPU_PROVIDER,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

LIBRARIES: Mapping[Device, str] = {
    "cuda": "libonnxruntime_providers_cuda.so",
    "tensorrt": "libonnxruntime_providers_tensorrt.so",
}
"""Files of the wheel for GPUs, by their names on Linux; elsewhere it is not looked at what they need."""

TENSORRT_LIBRARIES = ("libnvinfer", "libnvonnxparser")


def provider_options(place: Place) -> dict[str, str]:
    """What every session at a place is opened with.

    The GPU's arena grows by what is asked for: by default it doubles each time, and keeps what it never uses. The first
    GPU goes without saying: where device_id stands, onnxruntime 1.31 warns on stderr that it knows no plugin of it.
    """
    options = {"device_id": str(place.index)} if place.index else {}
    return options | ({"arena_extend_strategy": "kSameAsRequested"} if place.device == "cuda" else {})


def why_not(place: Place) -> str | None:
    """Why nothing can run at a place, and the command that mends it; None where nothing speaks against it.

    Loads NVIDIA's libraries from where pip put them, so that the provider finds them.
    """
    if place.device == "cpu":
        return None
    onnxruntime, provider = load_onnxruntime(), PROVIDERS[place.device]
    if provider not in onnxruntime.get_available_providers():
        return why_without_provider(provider)
    faults = [*_missing_libraries(place.device), *_driver_faults(place)]
    return "; ".join(faults) or None


def provider_library(device: Device) -> Path | None:
    """The provider's file in the installed onnxruntime; None where it is not a file of its own."""
    if device not in LIBRARIES:
        return None
    library = Path(str(load_onnxruntime().__file__)).parent / "capi" / LIBRARIES[device]
    return library if library.is_file() else None


def versions(place: Place) -> dict[str, str | None]:
    """Of everything that a session at a place runs on; None for what it does not use, or does not tell."""
    onnxruntime, library = load_onnxruntime(), provider_library(place.device)
    driver = Driver.here() if library else None
    return {
        "onnxruntime": onnxruntime.__version__,
        "wheel": onnxruntime.package_name,
        **(library_versions(library) if library else dict.fromkeys(("cuda", "cudnn", "tensorrt"))),
        "driver": str(driver) if driver else None,
    }


def _missing_libraries(device: Device) -> list[str]:
    """What is missing of CUDA's and TensorRT's libraries, and where it comes from."""
    onnxruntime = load_onnxruntime()
    library = provider_library(device)
    missing = [name for name in missing_libraries(library) if name != LIBRARY] if library else []
    of_tensorrt = [name for name in missing if name.startswith(TENSORRT_LIBRARIES)]
    of_cuda = [name for name in missing if name not in of_tensorrt]
    major = onnxruntime.cuda_version.partition(".")[0]
    faults = []
    if of_cuda:
        faults.append(
            f"CUDA {major}'s libraries {', '.join(of_cuda)} do not load; install them with: pip install "
            f"'onnxruntime-gpu[cuda,cudnn]=={onnxruntime.__version__}'"
        )
    if of_tensorrt:
        faults.append(
            f"TensorRT 10's libraries {', '.join(of_tensorrt)} do not load; install them with: pip install "
            f"'tensorrt-cu{major}<11'"
        )
    return faults


def _driver_faults(place: Place) -> list[str]:
    """What is wrong with the driver, or with the number of the GPU."""
    driver, built_for = Driver.here(), load_onnxruntime().cuda_version
    if driver is None:
        return [
            f"NVIDIA's driver is not installed ({LIBRARY} does not load); install it, or where this is a container, "
            "start it with the GPU: docker run --gpus all"
        ]
    if driver.cuda[0] < int(built_for.partition(".")[0]):
        return [f"NVIDIA's driver {driver} is too old for onnxruntime's CUDA {built_for}; install a newer driver"]
    if driver.fault:
        return [f"NVIDIA's driver {driver} does not start ({driver.fault}); see what nvidia-smi says, and mend that"]
    if place.index >= len(driver.gpus):
        return [
            f"there is no GPU {place.index}: the driver shows {len(driver.gpus)} (CUDA_VISIBLE_DEVICES and a "
            "container's --gpus hide others); name one that there is"
        ]
    return []
