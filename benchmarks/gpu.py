"""Packages on a GPU beside transformers with torch there: first token, tokens/s, share of the memory's bandwidth.

    python benchmarks/gpu.py CHECKPOINT PACKAGE [PACKAGE ...] [--device cuda:0] [--rounds 5] [--prompt-tokens 128]
                             [--new-tokens 256] [--attention sdpa eager] [--profile] [--results FILE]

Run it with an interpreter that has onnxruntime-gpu, torch for that GPU, and transformers. Greedy, one row, random
prompts, all in one process; rounds alternate between all engines, after a round that is not counted.

ttft_ms      from the call with ids to the first new id on the host
decode_ms    from one new id on the host to the next, all gaps
share        the bytes that a step must read (weights but tables that rows are picked from, keys and values at the mean
             length) over decode_ms, of what a copy within the GPU's memory moves, counting what it reads and writes
--profile    what the GPU does in a step, kernel by kernel, as torch's profiler sees it; of the packages
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime import SamplingOptions, TextGenerator
from runtime.command_line import CommandLineParser, run_command
from runtime.errors import RequestError
from runtime.place import Place

GREEDY = SamplingOptions.greedy()
COPIED_BYTES = 4 << 30
COPIES = 20
PROFILED_TOKENS = 20


@dataclass
class Engine:
    """What is measured, and what came out."""

    name: str
    step_bytes: float
    generate: Callable[[NDArray[np.int64], int], tuple[float, Sequence[float], Sequence[int]]]
    ttft_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    precision: str = "fp16"
    receipt: dict[str, Any] | None = None  # of a package


@dataclass(frozen=True)
class Row:
    engine: str
    ttft_ms: float
    decode_ms: float
    tokens_per_s: float
    share_of_bandwidth: float
    times_as_fast: float  # in decoding as the last engine
    same_ids: float  # share of new ids that equal the last engine's, up to the first other one


def of_package(folder: Path, place: Place, mean_length: float) -> Engine:
    generator = TextGenerator.load(folder, device=place)

    def generate(prompt: NDArray[np.int64], new_tokens: int) -> tuple[float, Sequence[float], Sequence[int]]:
        # No end-of-text, instead of one that is forbidden: logits that are edited must be fetched.
        sample = generator.generate(prompt, max_new_tokens=new_tokens, eos_token_id=(), sampling=GREEDY).samples[0]
        return sample.stats.ttft_ms, sample.stats.itl_ms, sample.ids

    manifest = generator.package.manifest
    return Engine(
        f"gpt2-edge {manifest.precision}, {folder.name}",
        manifest.decode_weight_bytes + manifest.cache_bytes_per_token * mean_length,
        generate,
        precision=manifest.precision,
        receipt=generator.decoder.receipt.to_dict(),
    )


def of_transformers(checkpoint: Path, place: Place, attention: str, step_bytes: float) -> Engine:
    from transformers import GPT2LMHeadModel  # noqa: PLC0415  takes seconds

    device = f"cuda:{place.index}"
    model = GPT2LMHeadModel.from_pretrained(checkpoint, dtype=torch.float16, attn_implementation=attention)
    model = model.to(device).eval()

    @torch.inference_mode()
    def generate(prompt: NDArray[np.int64], new_tokens: int) -> tuple[float, Sequence[float], Sequence[int]]:
        marks, ids, cache = [time.perf_counter()], [], None
        current = torch.from_numpy(prompt[None]).to(device)
        while len(ids) < new_tokens:
            output = model(current, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, current = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)  # [1, 1]
            ids.append(int(current))
            marks.append(time.perf_counter())
        gaps = np.diff(marks) * 1e3
        return float(gaps[0]), gaps[1:].tolist(), ids

    return Engine(f"transformers fp16, {attention} attention", step_bytes, generate)


def copy_bandwidth(device: str) -> float:
    """Bytes/s that a copy within the GPU's memory reads and writes: the best of some."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    times = []
    for _ in range(COPIES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * COPIED_BYTES / min(times)


def profile(engine: Engine, prompt: NDArray[np.int64]) -> dict[str, Any]:
    """Microseconds and launches of each kernel in a step, the dearest first."""
    engine.generate(prompt, PROFILED_TOKENS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as first:
        engine.generate(prompt, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as all_of_it:
        engine.generate(prompt, 1 + PROFILED_TOKENS)
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for taken, sign in ((all_of_it, 1), (first, -1)):
        for event in taken.key_averages():
            totals[event.key][0] += sign * event.self_device_time_total / PROFILED_TOKENS
            totals[event.key][1] += sign * event.count / PROFILED_TOKENS
    ranked = sorted(totals.items(), key=lambda item: -item[1][0])
    return {name: {"us": us, "launches": count} for name, (us, count) in ranked if us > 0}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    place, device = options.device, f"cuda:{options.device.index}"
    mean_length = options.prompt_tokens + options.new_tokens / 2
    engines = [of_package(folder, place, mean_length) for folder in options.packages]
    half = next((engine.step_bytes for engine in engines if engine.precision == "fp16"), None)
    if options.attention and half is None:
        raise RequestError(
            "no package is fp16, whose bytes are what transformers must read; name one, or no --attention"
        )
    engines += [of_transformers(options.checkpoint, place, attention, half or 0) for attention in options.attention]
    n_vocab = json.loads((options.checkpoint / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, n_vocab - 1, (1 + options.rounds, options.prompt_tokens))
    for number, prompt in enumerate(prompts):
        for engine in engines:
            ttft_ms, gaps_ms, ids = engine.generate(prompt, options.new_tokens)
            if number:
                engine.ttft_ms.append(ttft_ms)
                engine.gaps_ms += gaps_ms
                engine.ids.append(list(ids))
    bandwidth = copy_bandwidth(device)
    last = engines[-1]
    rows = [
        Row(
            engine.name,
            float(np.median(engine.ttft_ms)),
            float(np.median(engine.gaps_ms)),
            1e3 / float(np.mean(engine.gaps_ms)),
            engine.step_bytes / (float(np.median(engine.gaps_ms)) / 1e3) / bandwidth,
            float(np.median(last.gaps_ms)) / float(np.median(engine.gaps_ms)),
            float(np.mean([same(own, others) for own, others in zip(engine.ids, last.ids, strict=True)])),
        )
        for engine in engines
    ]
    packages = engines[: len(options.packages)] if options.profile else []
    return {
        "gpu": torch.cuda.get_device_name(device),
        "copy_gb_per_s": bandwidth / 1e9,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "warm_up_rounds": 1,
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "receipts": {engine.name: engine.receipt for engine in engines if engine.receipt},
        "rows": [asdict(row) for row in rows],
        "profiles": {engine.name: profile(engine, prompts[0]) for engine in packages},
    }


def same(own: Sequence[int], others: Sequence[int]) -> float:
    differ = np.flatnonzero(np.array(own) != np.array(others))
    return (int(differ[0]) if len(differ) else len(own)) / len(own)


def report(options: argparse.Namespace) -> int:
    result = measure(options)
    if options.results:
        options.results.write_text(json.dumps(result, indent=1))
    print(f"{result['gpu']}, {result['copy_gb_per_s']:.0f} GB/s; {options.rounds} rounds")
    for row in result["rows"]:
        print(
            f"{row['engine']:44} first {row['ttft_ms']:7.2f} ms, decode {row['decode_ms']:7.3f} ms, "
            f"{row['tokens_per_s']:7.1f} tokens/s, {row['share_of_bandwidth']:4.0%} of the bandwidth, "
            f"{row['times_as_fast']:5.2f} times, same ids {row['same_ids']:.0%}"
        )
    for name, kernels in result["profiles"].items():
        print(f"\n{name}: {sum(kernel['us'] for kernel in kernels.values()):.0f} us on the GPU in a step")
        for kernel, figures in kernels.items():
            print(f"{figures['us']:8.1f} us {figures['launches']:6.1f} x  {kernel[:110]}")
    return 0


def main() -> int:
    parser = CommandLineParser(prog="gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", type=Path, help="folder that transformers reads")
    parser.add_argument("packages", type=Path, nargs="+")
    parser.add_argument("--device", type=Place.parse, default=Place("cuda"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--attention", nargs="*", default=["sdpa", "eager"], help="of transformers")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--results", type=Path, metavar="FILE", help="write all of it there, as JSON")
    options = parser.parse_args()
    return run_command(lambda: report(options))


if __name__ == "__main__":
    sys.exit(main())
