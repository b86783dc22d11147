"""From a checkpoint to a package. This is the story; read it top-down.

python -m export.convert demo
"""

from __future__ import annotations

import argparse
import itertools
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import runtime
from runtime.command_line import CommandLineParser, print_json, run_command
from runtime.errors import RequestError
from runtime.package import (
    CACHE_ITEM_BYTES,
    MANIFEST,
    MODEL_FILES,
    TOKENIZER,
    TOP_K_MODEL,
    WEIGHTS_SUFFIX,
    CacheType,
    Device,
    FileEntry,
    Manifest,
    Precision,
    Source,
    file_entry,
    open_package,
    write_manifest,
)
from runtime.text_generator import open_decoder
from runtime.tokenizer import Tokenizer
from runtime.wheel import load_onnxruntime

from .adopt import GraphOrigin, GraphSource, check_rows, opened
from .calibration_text import SEQUENCES, text_of_file
from .checkpoint import Checkpoint
from .client_files import write_client_files, write_license, write_model_card
from .download import Progress
from .profile import shape_profile
from .progress_bar import ProgressBar
from .publish import refuse_to_replace, staged
from .resolve import FoundCheckpoint, find_checkpoint
from .stand_in import stand_in_decoder
from .target import PRECISIONS, Target
from .tokenizer_files import build_tokenizer, write_tokenizer
from .top_k_graph import write_top_k_graph
from .verification import PROMPTS, Verification, check, prompt_ids, verify_decoder
from .write_model import WrittenModel, write_model


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
            "device": self.manifest.device,
            "bytes": sum(entry.bytes for entry in self.manifest.files.values()),
            "parameters": self.manifest.config.parameter_count,
            "fingerprint": self.manifest.source.fingerprint,
            "recipe": dict(self.manifest.recipe),
            "quality": self.verification.quality(),
            "seconds": round(self.seconds, 2),
        }


def convert(
    path: Path,
    output: Path,
    *,
    name: str | None = None,
    device: Device = "cpu",
    precision: Precision | None = None,
    origin: GraphOrigin = "built",
    tokenizer_dir: Path | None = None,
    force: bool = False,
    allow_loss: bool = False,
    calibration: Path | None = None,
    kv_cache: CacheType | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Turn a checkpoint into a package that was verified, or leave everything as it was.

    Args:
        path: the checkpoint's folder, or its file where it is one file; the export if that is the graph's origin.
        output: the package's place.
        name: what the checkpoint is called; without it, as its folder or file is.
        device: where the package will run. None of it is needed here: the CPU stands in for it.
        precision: how weights are stored; None takes the device's default, as `export.target` says.
        origin: who makes the graph, see `export.adopt`.
        tokenizer_dir: holds the tokenizer; it lies beside the checkpoint where this is None.
        force: replace a package that is there.
        allow_loss: publish even if quantization cost more than the bar allows.
        calibration: a text that quantization is measured on; where this is None, the model writes one.
        kv_cache: what keys and values are stored as, None as usual on the device; int8 takes a quarter of the memory.
        progress: called as the work goes on.
    Raises:
        CheckpointError, TokenizerError, QuantizationError: the checkpoint is damaged, or not supported.
        PackageError: the output exists.
        RequestError: the text for calibration cannot be read, or is too short; the device, the precision, int8 keys and
            values or this graph do not go together.
        DeviceError: onnxruntime is too old.
        VerificationError: the package is not the model.
        OSError: the disk is full or cannot be written.
    """
    started = time.perf_counter()
    progress = progress or (lambda _what, _done, _steps: None)
    target = Target.of(device, precision, kv_cache)
    _refuse_contradictions(target, origin, calibration)
    refuse_to_replace(output, force=force)  # before an export, which takes long
    with opened(path, origin) as stored:
        folder = stored.checkpoint.folder
        tokenizer = build_tokenizer(tokenizer_dir or folder, n_vocab=stored.checkpoint.config.n_vocab)
        graph = stored.fitted(tokenizer.get_vocab())
        checkpoint = graph.checkpoint
        with staged(output, force=force) as staging:
            text = None
            if calibration is not None:
                text = text_of_file(calibration, tokenizer, checkpoint.config, SEQUENCES[target.precision])
            write_tokenizer(tokenizer, staging, checkpoint.config.n_ctx)
            own_tokenizer = Tokenizer.load(staging / TOKENIZER)
            prompts = [prompt_ids(prompt, own_tokenizer, checkpoint.config) for prompt in PROMPTS]
            written = write_model(staging, graph, target, prompts, text=text, progress=progress)
            if target.device == "cuda":
                write_top_k_graph(staging / TOP_K_MODEL, checkpoint.config)
            attention = target.attention(graph.attention)
            write_client_files(staging, checkpoint.config, target.precision, device=device, attention=attention)
            write_license(staging, folder)
            source = Source(
                name=_plain_text(name or checkpoint.name), layout=checkpoint.layout, fingerprint=written.fingerprint
            )
            manifest = _describe(staging, graph, target, source, written)
            write_manifest(staging, manifest)

            verification = _verify(staging, own_tokenizer, checkpoint, target, progress)
            check(verification, target.precision, allow_loss=allow_loss)

            manifest = replace(manifest, quality=verification.quality(), golden=verification.golden)
            write_model_card(staging, manifest)
            manifest = replace(manifest, files=_file_entries(staging, target.precision, written.weights))
            write_manifest(staging, manifest)
            open_package(staging)
    return Conversion(output, manifest, verification, time.perf_counter() - started)


def _refuse_contradictions(target: Target, origin: GraphOrigin, calibration: Path | None) -> None:
    if target.kv_cache == "int8" and (not target.quantized or origin != "built"):
        raise RequestError(
            "int8 keys and values need a calibrated package and a graph of our own; take --precision int8 or int4, "
            "without --from-onnx and --exporter"
        )
    if target.device != "cpu" and origin != "built":
        raise RequestError(
            f"a graph of another exporter is made into packages for the CPU only; for {target.device} leave "
            "--from-onnx and --exporter out"
        )
    if calibration is not None and not target.quantized:
        raise RequestError(
            f"a calibration text says how to quantize, and {target.precision} does not; leave --calibration out"
        )


def _describe(staging: Path, graph: GraphSource, target: Target, source: Source, written: WrittenModel) -> Manifest:
    tools = ("numpy", "onnx", "tokenizers")
    return Manifest(
        config=graph.checkpoint.config,
        precision=target.precision,
        device=target.device,
        attention=target.attention(graph.attention),
        kv_cache=target.kv_cache,
        opset=written.opset,
        decode_weight_bytes=written.decode_weight_bytes,
        needs=target.needs(),
        source=source,
        recipe=written.recipe,
        tools={"gpt2-edge": runtime.__version__, "python": platform.python_version()}
        | {"onnxruntime": load_onnxruntime().__version__}  # of whichever wheel
        | {name: version(name) for name in tools}
        | dict(graph.tools),
        files=_file_entries(staging, target.precision, written.weights),
        profile=shape_profile(graph.checkpoint.config) if target.device == "tensorrt" else {},
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


def _verify(
    staging: Path, tokenizer: Tokenizer, checkpoint: Checkpoint, target: Target, progress: Progress
) -> Verification:
    """Open the package with the real runtime and hold it against the oracle."""
    package = open_package(staging)
    if target.device == "cpu":
        decoder = open_decoder(package)
    else:
        decoder = stand_in_decoder(package.model_path, package.manifest)
    steps, total = itertools.count(1), len(PROMPTS) + checkpoint.config.n_layer + 1
    verification = verify_decoder(
        decoder,
        tokenizer,
        checkpoint.tensors,
        target.precision,
        progress=lambda _line: progress("verification", next(steps), total),
    )
    if decoder.attention == "plain":
        check_rows(decoder, verification.golden)
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
    parser.add_argument("--precision", choices=list(MODEL_FILES), help="default: int8 for the CPU, fp16 for the others")
    parser.add_argument("--device", choices=list(PRECISIONS), default="cpu", help="where the package will run")
    parser.add_argument(
        "--kv-cache",
        choices=list(CACHE_ITEM_BYTES),
        help="what keys and values are stored as; int8 for long contexts, on the CPU",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: packages/<name>-<precision>[-<device>]")
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
    target = Target.of(options.device, options.precision, options.kv_cache)
    origin: GraphOrigin = "adopted" if options.from_onnx else "optimum" if options.exporter == "optimum" else "built"
    with ProgressBar() as bar:
        if options.from_onnx:
            found = FoundCheckpoint(options.from_onnx, options.from_onnx.resolve().name)
        else:
            found = find_checkpoint(options.checkpoint, options.models_dir, offline=options.offline, progress=bar.show)
        made_by = "-optimum" if origin == "optimum" else ""
        conversion = convert(
            found.path,
            options.output or Path("packages") / f"{PurePath(found.name).name}{made_by}-{target.suffix}",
            name=found.name,
            device=target.device,
            precision=target.precision,
            origin=origin,
            tokenizer_dir=options.tokenizer,
            force=options.force,
            allow_loss=options.allow_loss,
            calibration=options.calibration,
            kv_cache=target.kv_cache,
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
    device = conversion.manifest.device
    if device != "cpu":
        print(
            f"measured on the CPU, where {device} was not; on the device: "
            f"python -m runtime.verify {conversion.package} --device {device}"
        )
    option = "" if device == "cpu" else f" --device {device}"
    print(f'try: python -m runtime.generate {conversion.package} "Once upon a time"{option}')


if __name__ == "__main__":
    sys.exit(main())
