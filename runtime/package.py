"""THE CONTRACT: what stands in a package folder, under which names, and how a reader knows that it is whole.

    manifest.json               ours: everything below, with a digest of itself
    config.json generation_config.json tokenizer.json tokenizer_config.json genai_config.json    for other clients too
    MODEL_CARD.md LICENSE       what it came from, how it was made, what it cost in quality
    onnx/model*.onnx            the graph; its weights lie beside it in `<graph>_data`

A folder without a manifest is no package. A reader MUST refuse a format version it does not know, a digest that does
not match, a file that is missing, of another size, or (all but the weights, whose sha256 takes seconds) of another
sha256, and any path that leads out of the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias, get_args

from .config import GPT2Config
from .errors import ConfigError, PackageError

FORMAT_VERSION = 3
READABLE_VERSIONS = (2, 3)
"""Version 2 knew the CPU alone: what version 3 added has a default."""

Precision = Literal["fp32", "fp16", "int8", "int4"]
Device = Literal["cpu", "cuda", "tensorrt"]
Attention = Literal["GroupQueryAttention", "plain"]
"""What a graph does with the keys and values it is given. GroupQueryAttention writes the new ones into the same buffer,
behind those that are there; plain attention returns them all in a longer tensor of its own."""

CacheType = Literal["float32", "float16", "int8"]
"""How keys and values are stored: float32 on the CPU, float16 elsewhere. int8 takes a quarter of the memory; its
scales, one for each channel, stand in the graph, which quantizes what it writes and dequantizes what it reads."""
CACHE_ITEM_BYTES: Mapping[CacheType, int] = {"float32": 4, "float16": 2, "int8": 1}

ShapeProfile: TypeAlias = "Mapping[str, Mapping[str, tuple[int, ...]]]"
"""The shapes that one TensorRT engine serves: "min", "opt" and "max" -> name of an input -> its shape."""

MANIFEST = "manifest.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENAI_CONFIG = "genai_config.json"
MODEL_CARD = "MODEL_CARD.md"
LICENSE = "LICENSE"
MODEL_FILES: Mapping[Precision, str] = {
    "fp32": "onnx/model.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_quantized.onnx",
    "int4": "onnx/model_q4.onnx",
}
"""Names that transformers.js, optimum and onnxruntime-genai find without being told."""
WEIGHTS_SUFFIX = "_data"
TOP_K_MODEL = "onnx/top_k.onnx"
"""In packages for CUDA: picks the largest of logits that lie on the device, see `export.top_k_graph`."""

INPUT_IDS = "input_ids"  # [B, S] int64
ATTENTION_MASK = "attention_mask"  # [B, P + S] int64, 1 where a token stands
POSITION_IDS = "position_ids"  # [B, S] int64
NUM_LOGITS_TO_KEEP = "num_logits_to_keep"  # [1] int64, optional; 0 keeps all
LOGITS = "logits"  # [B, S or num_logits_to_keep, V] float32
NEXT_IDS = "next_ids"  # [B, S or num_logits_to_keep] int64, of the largest logits; not in packages for the CPU
TOP_LOGITS, TOP_IDS = "top_logits", "top_ids"  # [B, K] float32 and int64, outputs of TOP_K_MODEL
CACHE_KINDS = ("key", "value")


def past_name(layer: int, kind: str) -> str:
    """[B, H, P, D] of the package's `CacheType`, or [B, H, M, D], M > P: a buffer that the graph writes in place."""
    return f"past_key_values.{layer}.{kind}"


def present_name(layer: int, kind: str) -> str:
    """[B, H, P + S, D] of the same type, or the same buffer as the past: see `Attention`."""
    return f"present.{layer}.{kind}"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What a file of the package must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What the package asks of the machine: processor features, and the oldest onnxruntime that was tried.

    Without any of the features its results would be wrong; but where it `narrows`, 7-bit activations take the place of
    8-bit ones there, and it runs: see `runtime.activations`.
    """

    onnxruntime: str
    processor: tuple[str, ...] = ()
    narrows: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the weights came from. The fingerprint is of the numbers, whatever the layout of their files."""

    name: str
    layout: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenPrompt:
    """A prompt, and what the oracle and this package answered where it was converted.

    The logits are those after the prompt's last token, of the ids in `top_ids`, largest first by the oracle. The greedy
    ids go on as far as the oracle's two largest logits stay apart by more than `tolerance` allows them to move.
    """

    prompt_ids: tuple[int, ...]
    top_ids: tuple[int, ...]
    oracle_logits: tuple[float, ...]
    package_logits: tuple[float, ...]
    greedy_ids: tuple[int, ...]
    tolerance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """manifest.json. `files` holds every other file by its path in the folder, with forward slashes.

    `decode_weight_bytes` is what a decode step reads of the weights, however many rows it has: the least traffic of a
    token, from which the share of the memory's speed that a device reaches can be told.
    """

    config: GPT2Config
    precision: Precision
    device: Device
    attention: Attention
    kv_cache: CacheType
    opset: int
    decode_weight_bytes: int
    needs: Needs
    source: Source
    recipe: Mapping[str, str]  # how the weights were quantized, in words
    tools: Mapping[str, str]
    files: Mapping[str, FileEntry]
    quality: Mapping[str, float] = field(default_factory=dict)
    golden: tuple[GoldenPrompt, ...] = ()
    profile: ShapeProfile = field(default_factory=dict)  # of packages for TensorRT

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token occupies in the cache, all layers."""
        return self.config.cache_items_per_token * CACHE_ITEM_BYTES[self.kv_cache]


@dataclass(frozen=True, slots=True)
class Package:
    """A folder whose manifest was read and whose files were checked."""

    folder: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        return self.folder / MODEL_FILES[self.manifest.precision]

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / TOKENIZER

    def generation_config(self) -> dict[str, Any]:
        return _read_json(self.folder, GENERATION_CONFIG)


def open_package(folder: str | Path, *, full: bool = False, progress: Callable[[int], None] | None = None) -> Package:
    """Read the manifest and check the files.

    Args:
        folder: the package.
        full: check the sha256 of the weights too, which takes a second for each 1 to 2 GB.
        progress: called with the number of bytes hashed since the last call.
    Raises:
        PackageError: no package, a format that this runtime does not read, or files that are not what the manifest
            says; all are named.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    weights = MODEL_FILES[manifest.precision] + WEIGHTS_SUFFIX
    for required in (MODEL_FILES[manifest.precision], weights, TOKENIZER, GENERATION_CONFIG):
        if required not in manifest.files:
            raise PackageError(f"{folder}: {MANIFEST} lists no {required}; convert the checkpoint again")
    faults = []
    for name, entry in manifest.files.items():
        try:
            _check_file(folder, name, entry, hashed=full or name != weights, progress=progress)
        except PackageError as fault:
            faults.append(str(fault))
        except OSError as error:
            faults.append(f"{name} cannot be read ({error.strerror})")
    if faults:
        raise PackageError(f"{folder}: {'; '.join(faults)}; copy the package again or convert again")
    return Package(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json and nothing else.

    Raises:
        PackageError: it is missing, damaged, or of another format version.
    """
    if not (folder / MANIFEST).is_file():
        if folder.is_dir():
            what, step = "a folder without a manifest is no package", f"python -m export.convert {folder}"
        else:
            what = "a file is no package, which is a folder" if folder.exists() else "no such folder"
            step = "python -m export.convert CHECKPOINT"
        raise PackageError(f"{folder}: {what}; name one, or make it of a checkpoint with: {step}")
    values = _read_json(folder, MANIFEST)
    version = values.get("format_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        step = "update gpt2-edge" if isinstance(version, int) and version > FORMAT_VERSION else "convert again"
        raise PackageError(
            f"{folder}: {MANIFEST} has format version {version!r}, this runtime reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}; {step}"
        )
    if values.pop("digest", None) != _digest(values):
        raise PackageError(f"{folder}: {MANIFEST} was altered (its digest does not match); copy the package again")
    del values["format_version"]
    try:
        return _manifest_from_values(values)
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise PackageError(f"{folder}: {MANIFEST} is malformed ({error}); convert the checkpoint again") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, digest included."""
    values = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    values["digest"] = _digest(values)
    (folder / MANIFEST).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def file_entry(path: Path, progress: Callable[[int], None] | None = None) -> FileEntry:
    """Size and sha256 of a file as it is now."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
            if progress:
                progress(len(piece))
    return FileEntry(size, digest.hexdigest())


def _manifest_from_values(values: dict[str, Any]) -> Manifest:
    if values["precision"] not in MODEL_FILES:
        raise ValueError(f"precision {values['precision']!r}, expected one of {', '.join(MODEL_FILES)}")
    if values["device"] not in get_args(Device):
        raise ValueError(f"device {values['device']!r}, expected one of {', '.join(get_args(Device))}")
    if values["attention"] not in get_args(Attention):
        raise ValueError(f"attention {values['attention']!r}, expected one of {', '.join(get_args(Attention))}")
    if values["kv_cache"] not in CACHE_ITEM_BYTES:
        raise ValueError(f"kv_cache {values['kv_cache']!r}, expected one of {', '.join(CACHE_ITEM_BYTES)}")
    if type(values["decode_weight_bytes"]) is not int or values["decode_weight_bytes"] < 1:
        raise ValueError(f"decode_weight_bytes {values['decode_weight_bytes']!r}, expected a whole number above 0")
    config, needs = GPT2Config.from_dict(values["config"]), values["needs"]
    return Manifest(
        **{
            **values,
            "config": config,
            "needs": Needs(
                onnxruntime=needs["onnxruntime"],
                processor=tuple(needs["processor"]),
                narrows=needs.get("narrows", False),  # absent where a package was made before there was a choice
            ),
            "source": Source(**values["source"]),
            "files": {name: FileEntry(**entry) for name, entry in values["files"].items()},
            "golden": tuple(_golden_from_values(golden, config.n_vocab) for golden in values["golden"]),
            "profile": {
                end: {name: tuple(map(int, shape)) for name, shape in shapes.items()}
                for end, shapes in values.get("profile", {}).items()
            },
        }
    )


def _golden_from_values(values: dict[str, Any], n_vocab: int) -> GoldenPrompt:
    top_ids = tuple(map(int, values["top_ids"]))
    if not top_ids or not 0 <= min(top_ids) <= max(top_ids) < n_vocab:
        raise ValueError(f"golden top_ids {top_ids} are not ids of the model")
    return GoldenPrompt(
        prompt_ids=tuple(map(int, values["prompt_ids"])),
        top_ids=top_ids,
        oracle_logits=tuple(map(float, values["oracle_logits"])),
        package_logits=tuple(map(float, values["package_logits"])),
        greedy_ids=tuple(map(int, values["greedy_ids"])),
        tolerance=float(values["tolerance"]),
    )


def _check_file(
    folder: Path, name: str, entry: FileEntry, *, hashed: bool, progress: Callable[[int], None] | None
) -> None:
    path = _inside(folder, name)
    if not path.is_file():
        raise PackageError(f"{name} is missing")
    size = path.stat().st_size
    if size != entry.bytes:
        raise PackageError(f"{name} has {size} bytes, the manifest says {entry.bytes}")
    if hashed and file_entry(path, progress).sha256 != entry.sha256:
        raise PackageError(f"{name} was altered (its sha256 is not the manifest's)")


def _inside(folder: Path, name: str) -> Path:
    """The file's path, if it stays in the folder when every link is followed."""
    relative = PurePosixPath(name)
    path = folder / relative
    if "\0" in name or relative.is_absolute() or ".." in relative.parts:
        raise PackageError(f"{name!r} leads out of the package")
    # os.path.realpath, since Path.resolve raises RuntimeError at a circle of links
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise PackageError(f"{name!r} leads out of the package")
    return path


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise PackageError(f"{folder}: {name} cannot be read ({error}); copy the package again") from error
    if not isinstance(values, dict):
        raise PackageError(f"{folder}: {name} holds no JSON object; copy the package again")
    return values


def _digest(values: Mapping[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
