"""The engines that are compared: what each needs installed, what it makes of a checkpoint, which script runs it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from export.tune import RECIPES
from runtime.errors import MachineError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "benchmarks" / "engines"

Prepare = Callable[[Path, Path, str, Path], None]
"""(interpreter that has the engine, checkpoint, type, folder to fill)"""


@dataclass(frozen=True)
class Software:
    """What engines share that differ in precision only."""

    name: str
    script: str
    requirements: tuple[tuple[str, ...], ...]  # one pip call each; none: this interpreter
    prepare: Prepare | None  # none: it runs the checkpoint as it is
    sources: tuple[str, ...] = ()  # of this repository: a model is made anew when one of them changed
    batches: bool = False  # whether cases of several rows are run


@dataclass(frozen=True)
class Engine:
    """One row of the comparison: a software at one precision."""

    software: Software
    type: str  # the precision in the engine's own words
    bits: int  # of a weight: what is comparable

    @property
    def name(self) -> str:
        return f"{self.software.name}-{self.type}"


def prepare_ours(python: Path, checkpoint: Path, kind: str, model: Path) -> None:
    precision, kv_cache = RECIPES[kind]
    wanted = ("--precision", precision, "--kv-cache", kv_cache)
    call(python, "-m", "export.convert", checkpoint, *wanted, "--output", model)


def prepare_openvino(python: Path, checkpoint: Path, kind: str, model: Path) -> None:
    task = ("--task", "text-generation-with-past")
    call(python.parent / "optimum-cli", "export", "openvino", "-m", checkpoint, *task, "--weight-format", kind, model)


def prepare_llama_cpp(python: Path, checkpoint: Path, kind: str, model: Path) -> None:
    model.mkdir()
    call(python, SCRIPTS / "write_gguf.py", checkpoint, kind, model / f"{kind}.gguf")


def prepare_ctranslate2(python: Path, checkpoint: Path, kind: str, model: Path) -> None:
    converter = python.parent / "ct2-transformers-converter"
    call(converter, "--model", checkpoint, "--output_dir", model, "--quantization", kind)


def prepare_optimum(python: Path, checkpoint: Path, kind: str, model: Path) -> None:
    call(python, SCRIPTS / "export_optimum.py", checkpoint, kind, model)


# A bare torch may come with gigabytes of CUDA: it is pinned, and installed before what would pull it.
TORCH = ("torch==2.13.0",)
TRANSFORMERS = "transformers==4.57.6"

GPT2_EDGE = Software(
    "gpt2-edge", "gpt2_edge.py", (), prepare_ours, sources=("runtime", "quantization", "export"), batches=True
)
OPENVINO_GENAI = Software(
    "openvino-genai",
    "openvino_genai_engine.py",
    (
        TORCH,
        ("openvino-genai==2026.4.1.0", "openvino==2026.4.1"),
        ("optimum==2.3.0", "transformers==5.5.4", "nncf==3.4.0", "requests==2.34.2"),
        # Without torchvision, which it asks for: no text needs it, and a torch without CUDA cannot load its CUDA build.
        ("--no-deps", "optimum-intel==2.2.0"),
    ),
    prepare_openvino,
)
LLAMA_CPP = Software(
    "llama.cpp",
    "llama_cpp_engine.py",
    (("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0"),),
    prepare_llama_cpp,
    sources=("benchmarks/engines/write_gguf.py",),
)
CTRANSLATE2 = Software(
    "ctranslate2",
    "ctranslate2_engine.py",
    (TORCH, (TRANSFORMERS, "ctranslate2==4.8.5")),
    prepare_ctranslate2,
    batches=True,
)
OPTIMUM = Software(
    "optimum",
    "optimum_engine.py",
    (TORCH, (TRANSFORMERS, "optimum-onnx==0.1.0", "onnxruntime==1.32.0")),
    prepare_optimum,
    sources=("benchmarks/engines/export_optimum.py",),
)
TRANSFORMERS_EAGER = Software("transformers", "transformers_engine.py", (TORCH, (TRANSFORMERS,)), None, batches=True)

ENGINES = {
    engine.name: engine
    for engine in (
        Engine(GPT2_EDGE, "int8", 8),
        Engine(GPT2_EDGE, "int8-kv8", 8),
        Engine(GPT2_EDGE, "int4", 4),
        Engine(GPT2_EDGE, "fp32", 32),
        Engine(OPENVINO_GENAI, "int8", 8),
        Engine(OPENVINO_GENAI, "int4", 4),
        Engine(LLAMA_CPP, "Q8_0", 8),
        Engine(LLAMA_CPP, "Q4_0", 4),
        Engine(CTRANSLATE2, "int8", 8),
        Engine(OPTIMUM, "int8", 8),
        Engine(OPTIMUM, "fp32", 32),
        Engine(TRANSFORMERS_EAGER, "fp32", 32),
    )
}


def call(*command: str | Path, **variables: str) -> str:
    """Run a command, its noise on our stderr; its stdout.

    Raises:
        MachineError: it ended with another status than 0.
    """
    words = [str(word) for word in command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(words, check=False, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise MachineError(
            f"{' '.join(words)} ended with status {done.returncode}; what it said stands above: mend it, or leave the "
            "engine out with --engines"
        )
    return done.stdout


def installed(software: Software, work: Path) -> Path:
    """The interpreter that has the software, installed now if it is not."""
    if not software.requirements:
        return Path(sys.executable)
    folder = work / "environments" / software.name
    python, wanted = folder / "bin" / "python", json.dumps(software.requirements)
    stamp = folder / "wanted"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {software.name}", file=sys.stderr)
        call(sys.executable, "-m", "venv", "--clear", folder)
        for requirements in software.requirements:
            call(python, "-m", "pip", "install", "--quiet", *requirements, CMAKE_ARGS="-DGGML_NATIVE=ON")
        stamp.write_text(wanted)
    return python


def prepared(engine: Engine, checkpoint: Path, work: Path) -> tuple[Path, Path]:
    """The interpreter and the model, made now unless they are there: of these files, by this software."""
    python = installed(engine.software, work)
    if engine.software.prepare is None:
        return python, checkpoint
    model = work / "models" / checkpoint.name / f"{engine.name}-{_made_from(engine.software, checkpoint)}"
    if not model.exists():
        print(f"making {engine.name} of {checkpoint.name}", file=sys.stderr)
        unfinished = model.with_name(f"{model.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        model.parent.mkdir(parents=True, exist_ok=True)
        engine.software.prepare(python, checkpoint, engine.type, unfinished)
        unfinished.rename(model)
    return python, model


def _made_from(software: Software, checkpoint: Path) -> str:
    """A short digest of what decides how a model comes out: the checkpoint, the software, our own code."""
    digest = hashlib.sha256(json.dumps(software.requirements).encode())
    for path in sorted(path for path in checkpoint.iterdir() if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    for path in _python_files(software):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _python_files(software: Software) -> Iterator[Path]:
    for source in software.sources:
        path = ROOT / source
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]
