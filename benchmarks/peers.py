"""Beside what a user would pick instead: the same checkpoint, the same prompt ids, greedy, rounds that alternate.

    scripts/bench peers CHECKPOINT [--work DIR] [--rounds 5] [--prompt-tokens 128] [--new-tokens 32]

Each round starts every engine in a process of its own, one after the other: load, one warm-up, three runs, medians.
What is claimed is the ratio of the medians over the rounds: the machine may be shared, and its speed drifts. The first
call installs the peers (llama.cpp is compiled, about ten minutes) and converts the checkpoint for each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENGINES = HERE / "engines"
OURS = "gpt2-edge"


@dataclass(frozen=True)
class Peer:
    """An engine: what it needs installed, what it makes of a checkpoint, and the script that runs it."""

    name: str
    type: str
    script: str
    requirements: tuple[tuple[str, ...], ...]  # one pip call each; none: this interpreter
    prepare: Callable[[Path, Path, Path], None]  # (its python, checkpoint, model folder)


def prepare_ours(_python: Path, checkpoint: Path, model: Path) -> None:
    call(sys.executable, "-m", "export.convert", checkpoint, "--output", model)


def prepare_openvino(python: Path, checkpoint: Path, model: Path) -> None:
    cli = python.parent / "optimum-cli"
    call(
        cli,
        "export",
        "openvino",
        "-m",
        checkpoint,
        "--task",
        "text-generation-with-past",
        "--weight-format",
        "int8",
        model,
    )


def prepare_llama_cpp(python: Path, checkpoint: Path, model: Path) -> None:
    model.mkdir(parents=True)
    call(python, ENGINES / "write_gguf.py", checkpoint, "Q8_0", model / "Q8_0.gguf")


PEERS = (
    Peer(OURS, "int8", "gpt2_edge.py", (), prepare_ours),
    Peer(
        "openvino-genai",
        "int8",
        "openvino_genai_engine.py",
        (("optimum-intel[openvino]==2.2.0", "openvino-genai==2026.4.1.0"),),
        prepare_openvino,
    ),
    Peer(
        "llama.cpp",
        "Q8_0",
        "llama_cpp_engine.py",
        (("gguf", "numpy", "safetensors", "llama-cpp-python==0.3.36"),),
        prepare_llama_cpp,
    ),
)


def call(*command: str | Path, **variables: str) -> str:
    """Run a command, its noise on our stderr; its stdout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return done.stdout


def python_of(peer: Peer, work: Path) -> Path:
    """The interpreter that has the engine, installed now if it is not."""
    if not peer.requirements:
        return Path(sys.executable)
    folder = work / "environments" / peer.name
    python, wanted = folder / "bin" / "python", json.dumps(peer.requirements)
    stamp = folder / "wanted"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {peer.name}", file=sys.stderr)
        call(sys.executable, "-m", "venv", "--clear", folder)
        for requirements in peer.requirements:
            call(python, "-m", "pip", "install", "--quiet", *requirements, CMAKE_ARGS="-DGGML_NATIVE=ON")
        stamp.write_text(wanted)
    return python


def run_round(peers: list[tuple[Peer, Path, Path]], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    results = {}
    for peer, python, model in peers:
        sizes = ["--prompt-tokens", str(options.prompt_tokens), "--new-tokens", str(options.new_tokens)]
        line = call(
            python, ENGINES / peer.script, model, "--type", peer.type, "--threads", str(options.threads), *sizes
        )
        results[peer.name] = json.loads(line.splitlines()[-1])
        print(f"{peer.name}: {line.splitlines()[-1]}", file=sys.stderr)
    return results


def summarise(rounds: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians over the rounds with their spread, and ours as a ratio to each."""
    rows = []
    for name in rounds[0]:
        row: dict[str, Any] = {"engine": name, "type": rounds[0][name]["type"]}
        for key in ("ttft_ms", "decode_ms", "load_s", "peak_rss_gb"):
            values = [one[name][key] for one in rounds]
            row[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        rows.append(row)
    ours = rows[0]
    for row in rows:
        row["ours_to_it"] = {key: ours[key]["median"] / row[key]["median"] for key in ("ttft_ms", "decode_ms")}
    return rows


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="Hugging Face folder with safetensors, vocab.json and merges.txt")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="environments and models; kept")
    parser.add_argument("--engines", nargs="+", default=[peer.name for peer in PEERS], choices=[p.name for p in PEERS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    peers = []
    for peer in PEERS:
        if peer.name in {OURS, *options.engines}:
            python = python_of(peer, options.work)
            model = options.work / "models" / options.checkpoint.resolve().name / f"{peer.name}-{peer.type}"
            if not model.exists():
                peer.prepare(python, options.checkpoint.resolve(), model)
            peers.append((peer, python, model))
    rows = summarise([run_round(peers, options) for _ in range(options.rounds)])
    receipt = {
        "date": date.today().isoformat(),
        "checkpoint": options.checkpoint.name,
        "processor": processor(),
        "threads": options.threads,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "load_average": os.getloadavg(),
    }
    if options.json:
        print(json.dumps({**receipt, "rows": rows}))
        return
    print(", ".join(f"{name} {value}" for name, value in receipt.items()))
    print("| engine | first token ms | decode ms/token | load s | peak RSS GB | ours: first token | ours: decode |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [
            f"{row[k]['median']:.{n}f} ({row[k]['min']:.{n}f}-{row[k]['max']:.{n}f})"
            for k, n in (("ttft_ms", 0), ("decode_ms", 1))
        ]
        cells += [f"{row['load_s']['median']:.1f}", f"{row['peak_rss_gb']['median']:.2f}"]
        cells += [f"{row['ours_to_it'][key]:.2f}" for key in ("ttft_ms", "decode_ms")]
        print(f"| {row['engine']} {row['type']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
