"""What a package is, and whether this machine meets what it needs, on one screen.

    python -m runtime.info PACKAGE

Nothing is loaded: the manifest is read, the files are checked as at every load, and what the machine lacks is told, not
refused. A damaged package is described as far as its manifest can be read; the command then ends with what is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .command_line import CommandLineParser, print_json, run_command
from .config import GPT2Config
from .errors import PackageError
from .needs import activations_here, unmet_needs
from .package import FORMAT_VERSION, WEIGHTS_SUFFIX, Manifest, open_package, read_manifest
from .processor import processor_features
from .wheel import installed_wheels


def show_package(folder: Path, *, as_json: bool) -> int:
    """Print what a package is.

    Raises:
        PackageError: its manifest cannot be read; or, once it is described, its files are not what that says.
    """
    manifest = read_manifest(folder)
    fault = None
    try:
        open_package(folder)
    except PackageError as error:
        fault = error
    print_report({"package": str(folder), "whole": fault is None} | _describe(manifest), as_json=as_json)
    if fault:
        raise fault
    return 0


def describe_config(config: GPT2Config, *, cache_bytes_per_token: int) -> dict[str, Any]:
    """The model's numbers, and what the cache of one sequence takes."""
    return {
        "parameters": config.parameter_count,
        "config": config.to_dict(),
        "cache_bytes_per_token": cache_bytes_per_token,
        "cache_bytes_in_full": cache_bytes_per_token * config.n_ctx,
    }


def print_report(report: Mapping[str, Any], *, as_json: bool) -> None:
    """As one JSON object, or a fact to a line, in words."""
    if as_json:
        print_json(report)
    else:
        print("\n".join(f"{name.replace('_', ' '):<22} {_in_words(value)}" for name, value in report.items()))


def _describe(manifest: Manifest) -> dict[str, Any]:
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    needs, features, onnxruntime = manifest.needs, processor_features(), next(iter(installed_wheels().values()), None)
    return {
        "name": manifest.source.name,
        "precision": manifest.precision,
        "device": manifest.device,
        "format_version": FORMAT_VERSION,
        "bytes": sum(sizes.values()),
        "weights_bytes": sum(size for name, size in sizes.items() if name.endswith(WEIGHTS_SUFFIX)),
        "decode_weight_bytes": manifest.decode_weight_bytes,
        "kv_cache": manifest.kv_cache,
        **describe_config(manifest.config, cache_bytes_per_token=manifest.cache_bytes_per_token),
        "needs": {"onnxruntime": needs.onnxruntime, "processor_with_one_of": needs.processor},
        "machine": {
            "onnxruntime": onnxruntime,
            "processor_with": None if features is None else sorted(features.intersection(needs.processor)),
            **({"activation_bits": activations_here(needs).bits} if needs.narrows else {}),
        },
        "unmet_needs": unmet_needs(needs, device=manifest.device, onnxruntime=onnxruntime),
        "source": asdict(manifest.source),
        "recipe": manifest.recipe,
        "quality": manifest.quality,
        "tools": manifest.tools,
        "golden_prompts": len(manifest.golden),
    }


def _in_words(value: Any) -> str:
    match value:
        case dict():
            return ", ".join(f"{name} {_in_words(each)}" for name, each in value.items())
        case list() | tuple():
            return ", ".join(map(_in_words, value)) or "none"
        case bool() | None:
            return {True: "yes", False: "no", None: "unknown"}[value]
        case int() | float():
            return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    parser = CommandLineParser(prog="python -m runtime.info", description="Tell what a package is, and what it needs.")
    parser.add_argument("package", type=Path, help="folder that export.convert wrote")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    options = parser.parse_args(argv)
    return run_command(lambda: show_package(options.package, as_json=options.json))


if __name__ == "__main__":
    sys.exit(main())
