"""Sessions: the device that was asked for or none, and as many threads as there are processors to run them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import onnxruntime
import pytest

from runtime.decoder import Decoder
from runtime.errors import DeviceError, PackageError, RequestError
from runtime.package import open_package
from runtime.place import Place
from runtime.processor import available_processors
from runtime.session import MAX_THREADS, open_session
from runtime.text_generator import TextGenerator
from runtime.wheel import load_onnxruntime

ROOT = Path(__file__).parent.parent


def run_python(code: str, *, arguments: Sequence[str] = (), **environment: str) -> str:
    """Run code in an interpreter of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | environment,
    )
    return done.stdout.strip()


# The device


def test_a_session_runs_on_the_cpu_provider_alone(tiny_fp32: Path) -> None:
    opened = open_session(open_package(tiny_fp32).model_path)
    assert opened.session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_is_not_here_is_refused_before_anything_is_read(tmp_path: Path, device: str) -> None:
    with pytest.raises(DeviceError, match=f"{device} cannot run here: "):
        open_session(tmp_path / "absent.onnx", place=Place.parse(device))


def test_another_device_than_the_package_was_made_for_is_refused(tiny_fp32: Path) -> None:
    with pytest.raises(DeviceError) as caught:
        TextGenerator.load(tiny_fp32, device="cuda")
    assert "was made for cpu, asked for cuda; load it with device cpu, or convert the checkpoint for cuda" in str(
        caught.value
    )
    assert "which cannot run here: the installed onnxruntime" in str(caught.value)


MEMORY_OF_A_PROMPT = """
import mmap, sys
from pathlib import Path
import numpy as np
from runtime.package import open_package
from runtime.text_generator import open_decoder

decoder, ids = open_decoder(open_package(Path(sys.argv[1]))), np.arange(480) % 100

def resident(chunk_tokens):
    decoder.start(batch=1, capacity=len(ids)).prefill(0, ids, chunk_tokens=chunk_tokens)
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

print([resident(chunk_tokens) for chunk_tokens in (240, 480, 240)])
"""
"""Bytes resident behind a prompt of 480 tokens in two pieces, in one, and in two. One of the demo model takes 6 MiB for
the scores of attention alone, one for each pair of tokens and head."""


def test_memory_of_a_long_prompt_is_given_back(demo_fp32: Path) -> None:
    """The arena keeps what a run took, unless the run is told to give it back, as the last of several pieces is.

    The C library gives it to the system at once here; by itself it keeps memory of sizes that were freed before.
    """
    printed = run_python(MEMORY_OF_A_PROMPT, arguments=[str(demo_fp32)], MALLOC_MMAP_THRESHOLD_=str(128 << 10))
    before, kept, given_back = ast.literal_eval(printed)
    assert kept - before > 6 << 20
    assert kept - given_back > 6 << 20


@pytest.mark.parametrize("threads", [0, -1, MAX_THREADS + 1, 1.5, "2", True])
def test_threads_out_of_range_are_refused(tiny_fp32: Path, threads: int) -> None:
    with pytest.raises(RequestError, match=f"threads is {threads!r}, expected a whole number from 1 to {MAX_THREADS}"):
        open_session(open_package(tiny_fp32).model_path, threads=threads)


def test_threads_are_those_that_were_asked_for(tiny_fp32: Path) -> None:
    opened = open_session(open_package(tiny_fp32).model_path, threads=3)
    assert opened.session.get_session_options().intra_op_num_threads == 3


def test_threads_are_the_processors_that_may_be_used_unless_asked_for(tiny_fp32: Path) -> None:
    opened = open_session(open_package(tiny_fp32).model_path)
    assert opened.session.get_session_options().intra_op_num_threads == available_processors()


def test_a_graph_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=rf"absent\.onnx: onnxruntime {onnxruntime.__version__} refuses it"):
        open_session(tmp_path / "absent.onnx")


# onnxruntime

TELEMETRY_AT_IMPORT = """
import os, sys
import runtime.wheel
assert "onnxruntime" not in sys.modules, "imported before its telemetry was switched off"

class Watcher:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print(os.environ.get("ORT_DISABLE_TELEMETRY"))

sys.meta_path.insert(0, Watcher())
runtime.wheel.load_onnxruntime()
"""


def test_telemetry_is_off_before_onnxruntime_is_imported() -> None:
    assert run_python(TELEMETRY_AT_IMPORT) == "1"


def test_what_the_application_says_of_telemetry_stands() -> None:
    assert run_python(TELEMETRY_AT_IMPORT, ORT_DISABLE_TELEMETRY="0") == "0"


def test_an_onnxruntime_that_does_not_import_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceError, match=r"onnxruntime does not import \(.*\); .*pip install 'gpt2-edge\[cpu\]'"):
        load_onnxruntime()


def test_half_an_onnxruntime_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left where one of two wheels was uninstalled: a folder without most of its files."""
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    with pytest.raises(DeviceError, match=r"installed in part.* pip uninstall -y onnxruntime onnxruntime-gpu"):
        load_onnxruntime()


def test_importing_the_runtime_without_onnxruntime_says_what_to_install() -> None:
    code = """
import sys
sys.modules["onnxruntime"] = None
try:
    import runtime
except ImportError as error:
    print(error)
"""
    printed = run_python(code)
    assert "ONNX Runtime, which is not installed" in printed
    assert "gpt2-edge[cpu]" in printed
    assert "gpt2-edge[gpu]" in printed


def test_a_package_and_its_draft_do_not_wait_on_each_others_processors(demo_int8: Path, demo_int4: Path) -> None:
    def stops_spinning(decoder: Decoder) -> bool:
        options = decoder.session.get_session_options()
        try:
            return bool(options.get_session_config_entry("session.force_spinning_stop") == "1")
        except RuntimeError:  # not set
            return False

    drafted = TextGenerator.load(demo_int8, draft=demo_int4)
    assert drafted.draft is not None
    assert stops_spinning(drafted.decoder) and stops_spinning(drafted.draft.decoder)
    assert not stops_spinning(TextGenerator.load(demo_int8).decoder)
