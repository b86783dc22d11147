"""Who may import whom, how large a room may grow, and what no tracked file may mention."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("runtime", "quantization", "export")

ALLOWED = {
    "runtime": {"numpy", "tokenizers", "onnxruntime"},
    "quantization": {"numpy", "onnx", "runtime"},
    "export": {
        "quantization",
        "runtime",
        "numpy",
        "onnx",
        "safetensors",
        "google_crc32c",
        "huggingface_hub",
        "tqdm",
        "tokenizers",
    },
}

# Only inside a function, when they are needed: heavy, or an extra for one option.
LAZY_ALLOWED = {
    "runtime": {"numpy", "tokenizers", "onnxruntime"},
    "quantization": ALLOWED["quantization"],
    "export": ALLOWED["export"] | {"torch", "optimum"},
}
LAZY_IN_COMMAND_LINES = {  # --plot
    "runtime/benchmark/plot.py": {"matplotlib"},
    "quantization/quality_plot.py": {"matplotlib"},
}
LAZY_ONLY = {"runtime": {"tokenizers", "onnxruntime"}}

NAMELESS = {"utils", "util", "helpers", "helper", "common", "base", "misc"}


@dataclass(frozen=True)
class Import:
    """One imported module: `level` dots, then `module`; for type checkers only, or only when a function is called."""

    module: str
    level: int
    typing_only: bool
    lazy: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def python_files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def depth_of(path: Path) -> int:
    """Folders between the repository and the file: how many dots lead from it to its room."""
    return len(path.relative_to(ROOT).parents) - 1


def every_file() -> list[object]:
    return [pytest.param(room, path, id=f"{room}/{path.name}") for room in ROOMS for path in python_files(room)]


def imports_of(path: Path) -> list[Import]:
    return list(_imports_in(ast.parse(path.read_text(encoding="utf-8")), typing_only=False, lazy=False))


def _imports_in(node: ast.AST, *, typing_only: bool, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import():
                yield from (Import(alias.name, 0, typing_only, lazy) for alias in child.names)
            case ast.ImportFrom(module=None):  # from . import name: the name is the module
                yield from (Import(alias.name, child.level, typing_only, lazy) for alias in child.names)
            case ast.ImportFrom(module=str(module)):
                yield Import(module, child.level, typing_only, lazy)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module)), *_]):
                yield Import(module, 0, typing_only, lazy)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                yield from _imports_in(child, typing_only=True, lazy=lazy)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                yield from _imports_in(child, typing_only=typing_only, lazy=True)
            case _:
                yield from _imports_in(child, typing_only=typing_only, lazy=lazy)


@pytest.mark.parametrize(("room", "path"), every_file())
def test_a_file_imports_what_its_room_may(room: str, path: Path) -> None:
    extra = LAZY_IN_COMMAND_LINES.get(path.relative_to(ROOT).as_posix(), set())
    for found in imports_of(path):
        if found.level or found.top in sys.stdlib_module_names:
            continue
        if found.typing_only and found.top == "typing_extensions":  # type checkers know it, whoever has it installed
            continue
        allowed = LAZY_ALLOWED[room] | extra if found.lazy else ALLOWED[room]
        assert found.top in allowed, f"{path.name} imports {found.module}"


@pytest.mark.parametrize(("room", "path"), every_file())
def test_heavy_libraries_wait_until_they_are_needed(room: str, path: Path) -> None:
    at_once = {found.top for found in imports_of(path) if not found.lazy and not found.typing_only}
    assert not at_once & LAZY_ONLY.get(room, set())


@pytest.mark.parametrize(("room", "path"), every_file())
def test_a_room_names_its_own_modules_relatively(room: str, path: Path) -> None:
    for found in imports_of(path):
        assert found.level <= depth_of(path), f"{path.name} climbs out of its room"
        assert found.level or found.top != room, f"{path.name} imports {found.module} by its full name"


@pytest.mark.parametrize("room", ROOMS)
def test_no_modules_import_each_other_in_a_circle(room: str) -> None:
    graph = {
        path.relative_to(ROOT).with_suffix("").as_posix(): {
            (path.parents[found.level - 1] / found.top).relative_to(ROOT).as_posix()
            for found in imports_of(path)
            if found.level and not found.lazy and not found.typing_only
        }
        for path in python_files(room)
    }
    assert set(TopologicalSorter(graph).static_order()) == set(graph)


def test_the_runtime_knows_nothing_of_its_benchmark() -> None:
    for path in python_files("runtime"):
        if depth_of(path) == 1:
            assert "benchmark" not in {found.top for found in imports_of(path)}


def test_importing_the_runtime_loads_no_library_but_numpy() -> None:
    program = "import sys, runtime; print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    loaded = set(result.stdout.split())
    assert "numpy" in loaded
    assert not loaded & {"onnx", "torch", "transformers", "optimum", "onnxruntime", "tokenizers", "export"}


def test_names_say_what_a_module_does() -> None:
    assert not {path.stem for room in ROOMS for path in python_files(room)} & NAMELESS


@pytest.fixture(scope="module")
def tracked() -> dict[str, str]:
    """Text of every tracked file, by its path."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout here: nobody knows which files are tracked")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    texts = {}
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in path.read_bytes():
            texts[name] = path.read_text(encoding="utf-8", errors="replace")
    return texts


def test_nothing_tracked_reaches_beside_the_repository(tracked: dict[str, str]) -> None:
    neighbour = "/".join(["..", "shared"])
    assert {name for name, text in tracked.items() if neighbour in text} <= {".ci/run"}


def test_no_document_or_code_names_a_place_on_one_machine(tracked: dict[str, str]) -> None:
    """Tests may: the path of somebody's machine is what some checkpoints hold."""
    place = re.compile(r"(?<![\w.:/])/(?:home|root|work|Users|opt)/\w")
    found = {name: match[0] for name, text in tracked.items() if (match := place.search(text))}
    assert {name: match for name, match in found.items() if not name.startswith("tests/")} == {}
