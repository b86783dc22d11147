"""From a checkpoint to a package. This is the story; read it top-down.

python -m export.convert demo
"""

from __future__ import annotations

import argparse
import itertools
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import runtime
from runtime.activations import NARROW, NARROW_RECIPE
from runtime.command_line import CommandLineParser, print_json, run_command
from runtime.decoder import Decoder
from runtime.errors import DeviceError, RequestError
from runtime.package import (
    CACHE_ITEM_BYTES,
    MANIFEST,
    MODEL_FILES,
    WEIGHTS_SUFFIX,
    CacheType,
    FileEntry,
    Manifest,
    Needs,
    Precision,
    Source,
    file_entry,
    open_package,
    write_manifest,
)
from runtime.session import activations_here, check_needs
from runtime.text_generator import TextGenerator

from .adopt import GraphOrigin, GraphSource, check_rows, opened
from .calibration import calibrate
from .calibration_text import SEQUENCES, Ids, own_text, text_of_file
from .checkpoint import Checkpoint
from .client_files import write_client_files, write_license, write_model_card
from .download import Progress
from .fingerprint import FingerprintedTensors
from .onnx_builder import WeightsFile
from .products import Tensors
from .progress_bar import ProgressBar
from .publish import refuse_to_replace, staged
from .resolve import FoundCheckpoint, find_checkpoint
from .step_weights import decode_weight_bytes
from .tokenizer_files import build_tokenizer, write_tokenizer
from .verification import PROMPTS, Verification, check, verify_decoder

OLDEST_ONNXRUNTIME: Mapping[Precision, str] = {"fp32": "1.22.1", "int8": "1.23.2", "int4": "1.23.2"}
"""The oldest versions that ran the demo package's golden prompts: older ones lack attention's bias input (fp32), or the
embedding in blocks (int8, int4). Tried: 1.20.1, 1.21.1, 1.22.1, 1.23.2, 1.24.4, 1.26.0, 1.28.0, 1.32.0."""

OLDEST_WITH_INT8_CACHE = "1.32.0"
"""No older one was tried."""

CACHE_RECIPES: Mapping[CacheType, str] = {
    "float32": "keys and values float32",
    "int8": "keys and values int8, one scale per channel",
}

RECIPES: Mapping[Precision, str] = {
    "fp32": "weights as in the checkpoint",
    "int8": "weights int8, one scale per output column; activations uint8, one scale per token; embedding and head "
    "8-bit in blocks",
    "int4": "weights 4-bit in blocks, embedding and head too; activations 8-bit in blocks",
}

INT8_FEATURES = ("avx512_vnni", "avx_vnni", "asimddp")
"""Linux's names of processor features, any of which multiplies uint8 by int8 without saturating at 16 bits."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion made."""

    package: Path
    manifest: Manifest
    verification: Verification
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result for `--json`."""
        return {
            "package": str(self.package),
            "precision": self.manifest.precision,
            "bytes": sum(entry.bytes for entry in self.manifest.files.values()),
            "parameters": self.manifest.config.parameter_count,
            "fingerprint": self.manifest.source.fingerprint,
            "recipe": dict(self.manifest.recipe),
            "quality": self.verification.quality(),
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True, slots=True)
class _WrittenModel:
    """What is known of graph and weights once they are on disk; nothing needs to be read again."""

    weights: FileEntry
    decode_weight_bytes: int
    fingerprint: str  # of the source
    kv_cache: CacheType
    recipe: Mapping[str, str]


def convert(
    path: Path,
    output: Path,
    *,
    name: str | None = None,
    precision: Precision = "int8",
    origin: GraphOrigin = "built",
    tokenizer_dir: Path | None = None,
    force: bool = False,
    allow_loss: bool = False,
    calibration: Path | None = None,
    kv_cache: CacheType = "float32",
    progress: Progress | None = None,
) -> Conversion:
    """Turn a checkpoint into a package that was verified, or leave everything as it was.

    Args:
        path: the checkpoint's folder, or its file where it is one file; the export if that is the graph's origin.
        output: the package's place.
        name: what the checkpoint is called; without it, as its folder or file is.
        precision: "fp32", "int8" or "int4".
        origin: who makes the graph, see `export.adopt`.
        tokenizer_dir: holds the tokenizer; it lies beside the checkpoint where this is None.
        force: replace a package that is there.
        allow_loss: publish even if quantization cost more than the bar allows.
        calibration: a text that quantization is measured on; where this is None, the model writes one.
        kv_cache: what keys and values are stored as; int8 takes a quarter of the memory.
        progress: called as the work goes on.
    Raises:
        CheckpointError, TokenizerError, QuantizationError: the checkpoint is damaged, or not supported.
        PackageError: the output exists.
        RequestError: the text for calibration cannot be read, or is too short; int8 keys and values are not for this
            precision, or this graph.
        DeviceError: onnxruntime is too old.
        VerificationError: the package is not the model.
        OSError: the disk is full or cannot be written.
    """
    started = time.perf_counter()
    progress = progress or (lambda _what, _done, _steps: None)
    if kv_cache == "int8" and (precision == "fp32" or origin != "built"):
        raise RequestError(
            "int8 keys and values need a calibrated package and a graph of our own; take --precision int8 or int4, "
            "without --from-onnx and --exporter"
        )
    if calibration is not None and precision == "fp32":
        raise RequestError("a calibration text says how to quantize, and fp32 does not; leave it out")
    refuse_to_replace(output, force=force)  # before an export, which takes long
    with opened(path, origin) as stored:
        folder = stored.checkpoint.folder
        tokenizer = build_tokenizer(tokenizer_dir or folder, n_vocab=stored.checkpoint.config.n_vocab)
        graph = stored.fitted(tokenizer.get_vocab())
        checkpoint = graph.checkpoint
        with staged(output, force=force) as staging:
            text = None
            if calibration is not None and precision != "fp32":
                text = text_of_file(calibration, tokenizer, checkpoint.config, SEQUENCES[precision])
            written = _write_model(staging, graph, precision, text, progress, kv_cache=kv_cache)
            write_tokenizer(tokenizer, staging, checkpoint.config.n_ctx)
            write_client_files(staging, checkpoint.config, precision, graph.attention)
            write_license(staging, folder)
            source = Source(
                name=_plain_text(name or checkpoint.name), layout=checkpoint.layout, fingerprint=written.fingerprint
            )
            manifest = _describe(staging, graph, precision, source, written)
            write_manifest(staging, manifest)

            verification = _verify(staging, checkpoint, precision, progress)
            check(verification, precision, allow_loss=allow_loss)

            manifest = replace(manifest, quality=verification.quality(), golden=verification.golden)
            write_model_card(staging, manifest)
            manifest = replace(manifest, files=_file_entries(staging, precision, written.weights))
            write_manifest(staging, manifest)
            open_package(staging)
    return Conversion(output, manifest, verification, time.perf_counter() - started)


def _write_model(
    staging: Path,
    graph: GraphSource,
    precision: Precision,
    text: Ids | None,
    progress: Progress,
    *,
    kv_cache: CacheType,
) -> _WrittenModel:
    """Quantize for the text, or for one that the model writes; write graph and weights."""
    model_path, config = staging / MODEL_FILES[precision], graph.checkpoint.config
    model_path.parent.mkdir()
    tensors = FingerprintedTensors(graph.tensors, lambda done: progress("weights", done, config.parameter_count))
    recipe = {"weights": RECIPES[precision], "cache": CACHE_RECIPES[kv_cache]}
    if activations_here(_needs(precision)) == NARROW:
        recipe[NARROW_RECIPE] = "verified with activations of 7 bits, as this processor takes them"
    if precision == "fp32":
        written = _write_graph(model_path, graph, tensors, precision)
    else:
        ids = _own_text(staging, graph, tensors, SEQUENCES[precision], progress) if text is None else text
        quantized = calibrate(
            config,
            tensors,
            ids,
            precision,
            lambda done: progress("calibration", done, config.parameter_count),
            kv_cache=kv_cache,
        )
        written = _write_graph(model_path, graph, quantized, precision)
        source = "that the model wrote" if text is None else "of a text that was given"
        recipe["calibration"] = f"calibrated on {ids.size:,} tokens {source}"
    return _WrittenModel(*written, tensors.fingerprint(), kv_cache, recipe)


def _own_text(staging: Path, graph: GraphSource, tensors: Tensors, sequences: int, progress: Progress) -> Ids:
    """Have a plain int8 graph write a text, and remove it."""
    check_needs(_needs("int8"), device="cpu")
    with tempfile.TemporaryDirectory(dir=staging) as folder:
        model_path = Path(folder) / "model.onnx"
        _write_graph(model_path, graph, tensors, "int8")
        decoder = Decoder.open(
            model_path,
            graph.checkpoint.config,
            attention=graph.attention,
            activations=activations_here(_needs("int8")),
        )
        return own_text(decoder, sequences, lambda done, total: progress("text", done, total))


def _write_graph(model_path: Path, graph: GraphSource, tensors: Tensors, precision: Precision) -> tuple[FileEntry, int]:
    """Write graph and weights, each tensor as it is looked up; the weights file's entry, what a decode step reads."""
    location = model_path.name + WEIGHTS_SUFFIX
    with (model_path.parent / location).open("wb") as file:
        weights = WeightsFile(file, location)
        model = graph.write_graph(graph.checkpoint.config, tensors, precision, weights)
    model_path.write_bytes(model.SerializeToString(deterministic=True))
    return weights.entry(), decode_weight_bytes(model)


def _needs(precision: Precision, kv_cache: CacheType = "float32") -> Needs:
    features = INT8_FEATURES if precision == "int8" else ()
    oldest = OLDEST_ONNXRUNTIME[precision] if kv_cache == "float32" else OLDEST_WITH_INT8_CACHE
    return Needs(onnxruntime=oldest, processor=features, narrows=bool(features))


def _describe(
    staging: Path, graph: GraphSource, precision: Precision, source: Source, written: _WrittenModel
) -> Manifest:
    tools = ("numpy", "onnx", "onnxruntime", "tokenizers")
    return Manifest(
        config=graph.checkpoint.config,
        precision=precision,
        device="cpu",
        attention=graph.attention,
        kv_cache=written.kv_cache,
        opset=graph.opset,
        decode_weight_bytes=written.decode_weight_bytes,
        needs=_needs(precision, written.kv_cache),
        source=source,
        recipe=written.recipe,
        tools={"gpt2-edge": runtime.__version__, "python": platform.python_version()}
        | {name: version(name) for name in tools}
        | dict(graph.tools),
        files=_file_entries(staging, precision, written.weights),
    )


def _plain_text(name: str) -> str:
    """A name as text; bytes in it that are no UTF-8 become question marks."""
    return name.encode(errors="replace").decode()


def _file_entries(staging: Path, precision: Precision, weights_entry: FileEntry) -> dict[str, FileEntry]:
    """Every file but the manifest; the weights were hashed as they were written."""
    weights = MODEL_FILES[precision] + WEIGHTS_SUFFIX
    names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
    return {
        name: weights_entry if name == weights else file_entry(staging / name) for name in names if name != MANIFEST
    }


def _verify(staging: Path, checkpoint: Checkpoint, precision: Precision, progress: Progress) -> Verification:
    """Open the package with the real runtime and hold it against the oracle."""
    generator = TextGenerator.load(staging)
    steps, total = itertools.count(1), len(PROMPTS) + checkpoint.config.n_layer + 1
    verification = verify_decoder(
        generator.decoder,
        generator.tokenizer,
        checkpoint.tensors,
        precision,
        progress=lambda _line: progress("verification", next(steps), total),
    )
    if generator.decoder.attention == "plain":
        check_rows(generator.decoder, verification.golden)
    return verification


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    return run_command(lambda: _convert(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLineParser(
        prog="python -m export.convert",
        description="Turn a GPT-2 checkpoint into a verified ONNX package.",
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="a folder, a file of nanoGPT or llm.c, a name under the models folder, a size (774M), a Hugging Face id",
    )
    parser.add_argument("--from-onnx", type=Path, metavar="DIR", help="instead: a folder that optimum exported")
    parser.add_argument("--exporter", choices=["own", "optimum"], help="who makes a checkpoint's graph; default: own")
    parser.add_argument("--precision", choices=list(MODEL_FILES), default="int8")
    parser.add_argument("--device", choices=["cpu", "cuda", "tensorrt"], default="cpu")
    parser.add_argument(
        "--kv-cache",
        choices=list(CACHE_ITEM_BYTES),
        default="float32",
        help="what keys and values are stored as; int8 for long contexts",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: packages/<name>-<precision>")
    parser.add_argument("--models-dir", type=Path, default=Path("models"), metavar="DIR", help="default: models")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: beside the checkpoint")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="a text to quantize for; default: one that the model writes"
    )
    parser.add_argument("--offline", action="store_true", help="download nothing; so does HF_HUB_OFFLINE=1")
    parser.add_argument("--force", action="store_true", help="replace the package that is there")
    parser.add_argument(
        "--allow-loss", action="store_true", help="publish even if quantization costs more than the bar allows"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    options = parser.parse_args(argv)
    if (options.checkpoint is None) == (options.from_onnx is None):
        parser.error("name either a checkpoint or --from-onnx DIR")
    if options.from_onnx and options.exporter:
        parser.error("--from-onnx and --exporter contradict each other: an export has its graph")
    if options.calibration and options.precision == "fp32":
        parser.error("--calibration says how to quantize, and --precision fp32 does not; leave one out")
    return options


def _convert(options: argparse.Namespace) -> int:
    if options.device != "cpu":
        raise DeviceError(
            f"--device {options.device}: this version makes packages for the CPU only; leave --device out"
        )
    origin: GraphOrigin = "adopted" if options.from_onnx else "optimum" if options.exporter == "optimum" else "built"
    with ProgressBar() as bar:
        if options.from_onnx:
            found = FoundCheckpoint(options.from_onnx, options.from_onnx.resolve().name)
        else:
            found = find_checkpoint(options.checkpoint, options.models_dir, offline=options.offline, progress=bar.show)
        made_by = "-optimum" if origin == "optimum" else ""
        cache = "-kv8" if options.kv_cache == "int8" else ""
        conversion = convert(
            found.path,
            options.output or Path("packages") / f"{PurePath(found.name).name}{made_by}-{options.precision}{cache}",
            name=found.name,
            precision=options.precision,
            origin=origin,
            tokenizer_dir=options.tokenizer,
            force=options.force,
            allow_loss=options.allow_loss,
            calibration=options.calibration,
            kv_cache=options.kv_cache,
            progress=bar.show,
        )
    if options.json:
        print_json(conversion.to_dict())
    else:
        _print(conversion)
    return 0


def _print(conversion: Conversion) -> None:
    result, verification = conversion.to_dict(), conversion.verification
    print(f"{conversion.package}: {result['bytes'] / 1e6:,.1f} MB in {conversion.seconds:.1f} s")
    print(
        f"against the float32 reference over {verification.tokens} tokens: KL {verification.kl:.2g} nats a token, "
        f"same most probable token {verification.top1:.1%}, logits off by at most {verification.largest_difference:.2g}"
    )
    print(f'try: python -m runtime.generate {conversion.package} "Once upon a time"')


if __name__ == "__main__":
    sys.exit(main())
