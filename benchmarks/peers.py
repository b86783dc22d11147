"""Beside what a user would pick instead: the same checkpoint, the same prompt ids, greedy, rounds that alternate.

    scripts/bench peers CHECKPOINT [--engines NAME,..] [--rounds 5] [--prompt-tokens 128,900] [--batch 1,8]
                                   [--new-tokens 32] [--threads 2] [--runs 1] [--note TEXT] [--work DIR] [--json]
    scripts/bench peers --readme      rewrites the README's section from the files in benchmarks/results

Writes benchmarks/results/<date>-peers-<checkpoint>.json after each round, and the same as a page (.md). The first call
installs the peers (llama.cpp is compiled, about ten minutes) and converts the checkpoint for each; --prepare does that
alone. How it is measured: METHOD in benchmarks/comparison/report.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.comparison.engines import ENGINES, ROOT, SCRIPTS, Engine, call, prepared
from benchmarks.comparison.report import (
    METHOD,
    Case,
    agreements,
    read_results,
    render_result,
    render_section,
    replace_section,
    result_name,
    summarise,
    write_result,
)
from export.checkpoint_config import read_hf_config
from runtime.benchmark.machine import processor_name
from runtime.command_line import CommandLineParser, print_json, run_command, some_of, whole_number, whole_numbers
from runtime.config import GPT2Config
from runtime.errors import CheckpointError, RequestError

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
NEEDED_FILES = ("config.json", "model.safetensors", "vocab.json", "merges.txt")
"""What every peer's converter reads."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    return run_command(lambda: _run(_parse(argv)))


def _run(options: argparse.Namespace) -> int:
    if options.readme:
        section = render_section(read_results(RESULTS))
        README.write_text(replace_section(README.read_text(encoding="utf-8"), section), encoding="utf-8")
        return 0
    checkpoint = options.checkpoint.resolve()
    config = check(checkpoint, options)
    engines = [ENGINES[name] for name in options.engines]
    result = _begin(checkpoint.name, engines, options)
    path = options.results / f"{result_name(result)}.json"
    if path.exists() and not options.prepare:
        raise RequestError(f"{path} exists: move it away, or name another folder with --results")
    models = {engine.name: prepared(engine, checkpoint, options.work) for engine in engines}
    if options.prepare:
        return 0
    result["load_average"] = {"start": os.getloadavg()}
    for number in range(options.rounds):
        result["rounds"].append(_run_round(number, engines, models, config, options))
        for engine in engines:
            result["engines"][engine.name]["versions"] = result["rounds"][-1][engine.name]["versions"]
        result["load_average"]["end"] = os.getloadavg()
        write_result(result, options.results)
    for row in agreements(result):
        if ENGINES[row.engine].bits == 32 and row.same < row.rows:
            print(f"{row.engine}: {row.rows - row.same} of {row.rows} rows have other first ids", file=sys.stderr)
    if options.json:
        print_json({**result, "summary": summarise(result)})
    else:
        print(render_result(result), end="")
    return 0


def check(checkpoint: Path, options: argparse.Namespace) -> GPT2Config:
    """Refuse what would fail later, in one of the engines.

    Raises:
        CheckpointError: a file is missing, or config.json is none of GPT-2.
        RequestError: the tokens do not fit the context, or an engine has nothing to run.
    """
    missing = [name for name in NEEDED_FILES if not (checkpoint / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{checkpoint}: no {', '.join(missing)}; name a Hugging Face folder that has {', '.join(NEEDED_FILES)}"
        )
    _, config = read_hf_config(checkpoint / "config.json")
    tokens = max(options.prompt_tokens) + options.new_tokens
    if tokens > config.n_ctx:
        raise RequestError(
            f"a prompt of {max(options.prompt_tokens)} and {options.new_tokens} new tokens do not fit the context of "
            f"{config.n_ctx}; ask for fewer"
        )
    idle = [name for name in options.engines if not cases_of(ENGINES[name], options)]
    if idle:
        raise RequestError(f"{', '.join(idle)}: run one row only; add 1 to --batch, or leave them out with --engines")
    return config


def cases_of(engine: Engine, options: argparse.Namespace) -> list[Case]:
    """One row with every prompt; more rows with the shortest only, for a long prompt eight times over takes minutes."""
    cases = [Case(1, prompt_tokens) for prompt_tokens in options.prompt_tokens if 1 in options.batch]
    if engine.software.batches:
        cases += [Case(batch, min(options.prompt_tokens)) for batch in options.batch if batch > 1]
    return sorted(cases)  # one row first: the peak of memory is told after each case


def order_of_round(names: Sequence[str], number: int) -> list[str]:
    """Forwards, backwards, then from the next engine on: nobody always runs behind the same one."""
    ordered = list(names)[::-1] if number % 2 else list(names)
    start = number // 2 % len(names)
    return ordered[start:] + ordered[:start]


def _run_round(
    number: int,
    engines: Sequence[Engine],
    models: dict[str, tuple[Path, Path]],
    config: GPT2Config,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Every engine's report, in the order in which they ran."""
    reports = {}
    for place, name in enumerate(order_of_round([engine.name for engine in engines], number), start=1):
        print(f"round {number + 1} of {options.rounds}: {name}, {place} of {len(engines)}", file=sys.stderr)
        engine, (python, model) = ENGINES[name], models[name]
        words = {
            "--type": engine.type,
            "--new-tokens": options.new_tokens,
            "--threads": options.threads,
            "--runs": options.runs,
            "--n-vocab": config.n_vocab,
        }
        cases = [f"{case.prompt_tokens}x{case.batch}" for case in cases_of(engine, options)]
        numbers = [str(word) for pair in words.items() for word in pair]
        output = call(python, SCRIPTS / engine.software.script, model, *numbers, "--cases", *cases)
        reports[name] = json.loads(output.splitlines()[-1])
    return reports


def _begin(checkpoint: str, engines: Sequence[Engine], options: argparse.Namespace) -> dict[str, Any]:
    """A result without rounds: what is measured, where, how."""
    told = ("prompt_tokens", "batch", "new_tokens", "threads", "rounds", "runs")
    return {
        "checkpoint": checkpoint,
        "note": options.note,
        "date": date.today().isoformat(),
        "commit": _commit(),
        "machine": {
            "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "options": {name: getattr(options, name) for name in told},
        "method": METHOD,
        "engines": {
            engine.name: {
                "software": engine.software.name,
                "type": engine.type,
                "bits": engine.bits,
                "batches": engine.software.batches,
            }
            for engine in engines
        },
        "rounds": [],
    }


def _commit() -> str:
    """Of this checkout, and whether files differ from it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(git, check=False, capture_output=True, text=True)
    return done.stdout.strip() or "no git checkout"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLineParser(
        prog="scripts/bench peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help=f"a folder that has {', '.join(NEEDED_FILES)}")
    parser.add_argument("--readme", action="store_true", help="measure nothing; rewrite the README's section")
    parser.add_argument("--prepare", action="store_true", help="measure nothing; install and convert what is missing")
    parser.add_argument(
        "--engines", type=some_of("engine", ENGINES), default=list(ENGINES), metavar="NAME,..", help="default: all"
    )
    parser.add_argument(
        "--prompt-tokens", type=whole_numbers, default=[128, 900], metavar="N,..", help="default: 128,900"
    )
    parser.add_argument(
        "--batch",
        type=whole_numbers,
        default=[1, 8],
        metavar="N,..",
        help="prompts at once: several with the shortest prompt only, by the engines that take several; default: 1,8",
    )
    parser.add_argument("--new-tokens", type=whole_number(2), default=32, metavar="N", help="default: 32")
    parser.add_argument("--threads", type=whole_number(1), default=2, metavar="N", help="default: 2")
    parser.add_argument("--rounds", type=whole_number(1), default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--runs", type=whole_number(1), default=1, metavar="N", help="measured runs of a case, each round"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "peers", metavar="DIR", help="environments and models; kept"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument(
        "--note", default="", metavar="TEXT", help="told beside the checkpoint, such as: random weights"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    options = parser.parse_args(argv)
    if options.readme == (options.checkpoint is not None):
        parser.error("name either a checkpoint or --readme")
    return options


if __name__ == "__main__":
    sys.exit(main())
