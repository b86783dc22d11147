"""What int8 and int4 lose on a checkpoint, and on the same function with outliers planted in it (tests/outliers.py).

    scripts/bench outliers CHECKPOINT [--tokens sampled|random] [--count 2048] [--seed 0] [--json]

Each model is converted to both, whatever it loses, and held against the original's fp32 package over the same ids:
sampled from that package (text in the model's own style), or uniform random ids (for random weights, whose samples mean
nothing). The planted models are converted to fp32 too: their figures show that planting left the function alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.checkpoint import read_checkpoint
from export.convert import convert
from export.tokenizer_files import build_tokenizer, write_tokenizer
from export.verification import MAX_KL
from quantization.divergence import kl_divergence
from runtime.config import GPT2Config
from runtime.decoder import Decoder
from runtime.errors import GPT2EdgeError
from runtime.package import Precision, open_package
from runtime.text_generator import TextGenerator, open_decoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/ is not installed

from tests.outliers import plant_activation_outliers, plant_norm_outliers
from tests.tiny import write_safetensors_checkpoint

WINDOW_TOKENS = 256
"""Tokens of one sequence."""

QUANTIZED: tuple[Precision, ...] = ("int8", "int4")

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """One package against the original's fp32 package; means over the tokens."""

    model: str
    precision: Precision
    tokens: int
    kl: float  # nats a token
    kl_standard_error: float
    top1: float  # share of tokens
    largest_difference: float  # of a logit, in standard deviations of its position's logits


def main() -> int:
    options = _parse()
    try:
        with tempfile.TemporaryDirectory(prefix="outliers-") as work:
            rows = list(measure(options.checkpoint, Path(work), options))
    except GPT2EdgeError as error:
        print(f"outliers: {error}", file=sys.stderr)
        return 2
    receipt = {
        "tokens": options.tokens,
        "seed": options.seed,
        "window_tokens": WINDOW_TOKENS,
        **{f"{precision}_bar_kl": kl for precision, kl in MAX_KL.items()},
        "onnxruntime": version("onnxruntime"),
    }
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "receipt": receipt}, indent=2))
    else:
        _print_table(rows)
        print(", ".join(f"{name} {value}" for name, value in receipt.items()))
    return 0


def measure(checkpoint: Path, work: Path, options: argparse.Namespace) -> Iterator[Row]:
    """The original quantized, then each planted model in every precision, written and removed one after the other."""
    original = _convert(checkpoint, work / "original", "fp32")
    sequences = _sequences(original, options)
    reference = open_decoder(open_package(original))

    def held_against_original(name: str, folder: Path, precision: Precision) -> Row:
        package = _convert(folder, work / "package", precision)
        row = _compare(name, precision, reference, open_decoder(open_package(package)), sequences)
        shutil.rmtree(package)
        return row

    for quantized in QUANTIZED:
        yield held_against_original("original", checkpoint, quantized)
    for name in ("norm outliers", "activation outliers"):
        planted = _plant(name, checkpoint, work / "planted")
        yield held_against_original(name, planted, "fp32")
        for quantized in QUANTIZED:
            yield held_against_original(name, planted, quantized)
        shutil.rmtree(planted)


def _plant(name: str, checkpoint: Path, folder: Path) -> Path:
    source = read_checkpoint(checkpoint)
    config: GPT2Config = source.config
    weights = dict(source.tensors)
    if name == "norm outliers":
        weights = plant_norm_outliers(config, weights)
    else:
        config, weights = plant_activation_outliers(config, weights)
    write_safetensors_checkpoint(folder, config, weights)
    write_tokenizer(build_tokenizer(checkpoint, n_vocab=config.n_vocab), folder, config.n_ctx)
    return folder


def _convert(checkpoint: Path, output: Path, precision: Precision) -> Path:
    print(f"converting {checkpoint.name} to {precision}", file=sys.stderr)
    return convert(checkpoint, output, precision=precision, allow_loss=True).package


def _compare(name: str, precision: Precision, reference: Decoder, decoder: Decoder, sequences: list[Int64Array]) -> Row:
    kl, same, largest = [], [], 0.0
    for ids in sequences:
        for expected, got in zip(reference.logits(ids), decoder.logits(ids), strict=True):  # [S, V] each
            kl.append(kl_divergence(expected, got))
            same.append(expected.argmax(axis=-1) == got.argmax(axis=-1))
            moved = np.abs(got - expected).max(axis=-1) / expected.std(axis=-1)
            largest = max(largest, float(moved.max()))
    each = np.concatenate(kl)
    return Row(
        model=name,
        precision=precision,
        tokens=len(each),
        kl=float(each.mean()),
        kl_standard_error=float(each.std(ddof=1) / np.sqrt(len(each))),
        top1=float(np.concatenate(same).mean()),
        largest_difference=largest,
    )


def _sequences(package: Path, options: argparse.Namespace) -> list[Int64Array]:
    """`count` ids or a few more, in sequences of at most WINDOW_TOKENS."""
    generator = TextGenerator.load(package)
    config = generator.config
    window = min(WINDOW_TOKENS, config.n_ctx)
    if options.tokens == "random":
        rng = np.random.default_rng(options.seed)
        return [rng.integers(0, config.n_vocab, window) for _ in range(-(-options.count // window))]
    sequences: list[Int64Array] = []
    seed = options.seed
    while sum(map(len, sequences)) < options.count:
        sampling = replace(generator.default_sampling, do_sample=True, seed=seed)
        result = generator.generate(max_new_tokens=window - 1, sampling=sampling)
        sequences.append(np.array([*result.prompt_ids, *result.samples[0].ids], np.int64))
        seed += 1
    return sequences


def _print_table(rows: list[Row]) -> None:
    print("| model | precision | tokens | KL, nats a token (standard error) | same top token | largest difference |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.model} | {row.precision} | {row.tokens} | {row.kl:.3g} ({row.kl_standard_error:.1g}) "
            f"| {row.top1:.2%} | {row.largest_difference:.2g} std |"
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's folder")
    parser.add_argument(
        "--tokens",
        choices=["sampled", "random"],
        default="sampled",
        help="sampled: written by the fp32 package (default); random: uniform ids, for random weights",
    )
    parser.add_argument("--count", type=int, default=2048, help="tokens at least (default 2048)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
