"""How TensorRT is told to build one engine for all lengths, and to find it again.

An engine belongs to a model, a TensorRT version and a GPU. They make the name of its folder, so that another of any of
them builds its own and no stale engine is ever taken.

Unverified: TensorRT was never at hand. The options' names are those of onnxruntime-gpu 1.31.1.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from .driver import Driver
from .errors import DeviceError, MachineError, RequestError
from .package import INPUT_IDS, MODEL_FILES, WEIGHTS_SUFFIX, Manifest, ShapeProfile
from .place import Place
from .provider import versions, why_not

KEY_DIGITS = 16
"""Hexadecimal digits of the model's hash in a folder's name."""


def engine_folder(manifest: Manifest, cache_dir: Path, *, tensorrt_version: str, gpu: str) -> Path:
    """Where the engine of a package lies, for one TensorRT version and one GPU as the driver calls it."""
    machine = re.sub(r"[^A-Za-z0-9.]+", "-", f"{gpu} tensorrt {tensorrt_version}").strip("-").lower()
    return cache_dir / f"{model_hash(manifest)[:KEY_DIGITS]}-{machine}"


def engine_folder_here(manifest: Manifest, place: Place, cache_dir: Path | None = None) -> Path:
    """The folder of a package's engine for this machine, made if it is not there.

    Args:
        manifest: of a package for TensorRT.
        place: the GPU.
        cache_dir: where engines of all packages are kept; None takes `default_cache_dir`.
    Raises:
        DeviceError: TensorRT or the driver cannot be had, with what is missing.
        MachineError: the folder cannot be made.
    """
    if fault := why_not(place):
        raise DeviceError(f"{place} cannot run here: {fault}")
    driver = Driver.here()
    assert driver is not None, "there would be a fault"
    folder = engine_folder(
        manifest,
        cache_dir or default_cache_dir(),
        tensorrt_version=versions(place)["tensorrt"] or "unknown",
        gpu=driver.gpus[place.index].name,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        step = "set XDG_CACHE_HOME to another place"
        raise MachineError(f"{folder}: cannot be made ({error.strerror}); {step}") from error
    return folder


def default_cache_dir() -> Path:
    """Where a user's caches are kept, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2-edge"


def model_hash(manifest: Manifest) -> str:
    """sha256, in hexadecimal, of what the engine is compiled from: graph, weights and profile."""
    model = MODEL_FILES[manifest.precision]
    parts = [manifest.files[name].sha256 for name in (model, model + WEIGHTS_SUFFIX)]
    parts += [shapes_text(manifest.profile[end]) for end in ("min", "opt", "max")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def tensorrt_options(manifest: Manifest, folder: Path) -> dict[str, str]:
    """Options of onnxruntime's TensorRT provider for a package.

    Args:
        manifest: of a package for TensorRT.
        folder: where engine and timing cache are kept, from `engine_folder`.
    """
    assert manifest.device == "tensorrt" and manifest.profile, "a package for TensorRT has a profile"
    return {
        **{f"trt_profile_{end}_shapes": shapes_text(manifest.profile[end]) for end in ("min", "opt", "max")},
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": "gpt2",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_fp16_enable": "1",  # the graph is typed, but the engine is not built as strongly typed
        **({"trt_int8_enable": "1"} if manifest.precision == "int8" else {}),
    }


def shapes_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """`input_ids:1x1,attention_mask:1x512`, as TensorRT's provider reads shapes."""
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def check_fits(profile: ShapeProfile, *, rows: int, new_tokens: int) -> None:
    """Refuse a run for which no engine was built, instead of having another built in the midst of it.

    Raises:
        RequestError: more rows, or more new tokens at once, than the profile serves.
    """
    most_rows, most_tokens = profile["max"][INPUT_IDS]
    if rows > most_rows or new_tokens > most_tokens:
        raise RequestError(
            f"{rows} rows of {new_tokens} new tokens at once: this package's TensorRT engine serves at most "
            f"{most_rows} rows and {most_tokens} tokens; ask for fewer samples at once, or shorter pieces"
        )
