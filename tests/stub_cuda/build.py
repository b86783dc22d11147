"""Compile CUDA libraries that do nothing, for one installed onnxruntime-gpu; see README.md."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
OWN_SOURCES = {"libcudart.so.13": "runtime.c", "libcuda.so.1": "driver.c"}
LIBRARIES = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10", "libcuda.so.1")

MAKES_A_HANDLE = ("cublasCreate_v2", "cublasLtCreate")
FINDS_AN_ALGORITHM = "cublasLtMatmulAlgoGetHeuristic"


def build_stub(capi: Path, folder: Path) -> None:
    """Write the libraries into a folder that is put into LD_LIBRARY_PATH.

    Args:
        capi: onnxruntime/capi of the wheel.
        folder: is there, and empty.
    Raises:
        subprocess.CalledProcessError: nm or gcc failed.
    """
    wanted = _wanted_functions(capi / "libonnxruntime_providers_cuda.so")
    for library in LIBRARIES:
        written = (HERE / OWN_SOURCES[library]).read_text(encoding="utf-8") if library in OWN_SOURCES else ""
        there = set(re.findall(r"^[\w *]*?\b(_*cu\w+)\(", written, re.MULTILINE))
        source = folder / f"{library}.c"
        source.write_text(written + "\n".join(map(_empty, sorted(wanted[library] - there))), encoding="utf-8")
        versions = folder / f"{library}.map"
        versions.write_text(f"{library} {{ global: *; }};\n", encoding="utf-8")
        options = ["-w", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library}", f"-Wl,--version-script={versions}"]
        subprocess.run(["gcc", *options, "-o", folder / library, source], check=True)


def _wanted_functions(provider: Path) -> dict[str, set[str]]:
    """Functions that a provider wants of CUDA, by library: the version of a symbol is the library's name."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True)
    wanted = defaultdict(set)
    for line in listed.stdout.splitlines():
        if match := re.fullmatch(r"(_*cu\w+)(?:@+(\S+))?", line.split()[-1]):
            wanted[match[2] or "libcuda.so.1"].add(match[1])
    return wanted


def _empty(function: str) -> str:
    """C of a function that succeeds and does nothing."""
    if function in MAKES_A_HANDLE:
        return f"int {function}(void **made) {{ *made = (void *)4096; return 0; }}"
    if function == FINDS_AN_ALGORITHM:
        arguments = "void *a, void *b, void *c, void *d, void *e, void *f, void *g, int wanted, char *found, int *count"
        return f"int {function}({arguments}) {{ __builtin_memset(found, 0, 256); *count = 1; return 0; }}"
    if "GetStatus" in function:
        return f'const char *{function}(int status) {{ return "stub"; }}'
    return f"int {function}(void) {{ return 0; }}"
