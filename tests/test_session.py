"""Sessions: the device that was asked for or none, and as many threads as there are processors to run them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from runtime import session
from runtime.errors import DeviceError, PackageError, RequestError
from runtime.package import Needs, open_package
from runtime.session import MAX_THREADS, available_processors, check_needs, load_onnxruntime, open_session
from runtime.text_generator import TextGenerator

ROOT = Path(__file__).parent.parent


def run_python(code: str, **environment: str) -> str:
    """Run code in an interpreter of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
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
    assert opened.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("device", ["cuda", "tensorrt", "gpu", "CPU"])
def test_another_device_is_refused_before_anything_is_read(tmp_path: Path, device: str) -> None:
    with pytest.raises(DeviceError, match=f"device '{device}' is not supported by this version, expected cpu"):
        open_session(tmp_path / "absent.onnx", device=device)  # type: ignore[arg-type]


def test_another_device_than_the_package_was_made_for_is_refused(tiny_fp32: Path) -> None:
    with pytest.raises(DeviceError, match="was made for cpu, asked for cuda; load it with device cpu, or convert"):
        TextGenerator.load(tiny_fp32, device="cuda")


@pytest.mark.parametrize("threads", [0, -1, MAX_THREADS + 1, 1.5, "2", True])
def test_threads_out_of_range_are_refused(tiny_fp32: Path, threads: int) -> None:
    with pytest.raises(RequestError, match=f"threads is {threads!r}, expected a whole number from 1 to {MAX_THREADS}"):
        open_session(open_package(tiny_fp32).model_path, threads=threads)


def test_threads_are_those_that_were_asked_for(tiny_fp32: Path) -> None:
    opened = open_session(open_package(tiny_fp32).model_path, threads=3)
    assert opened.get_session_options().intra_op_num_threads == 3


def test_threads_are_the_processors_that_may_be_used_unless_asked_for(tiny_fp32: Path) -> None:
    opened = open_session(open_package(tiny_fp32).model_path)
    assert opened.get_session_options().intra_op_num_threads == available_processors()


def test_a_graph_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=rf"absent\.onnx: onnxruntime {onnxruntime.__version__} refuses it"):
        open_session(tmp_path / "absent.onnx")


# What a package needs


def test_a_processor_without_any_needed_feature_is_refused() -> None:
    if session.processor_features() is None:
        pytest.skip("this system does not tell what its processor has")
    needs = Needs(onnxruntime="1.32.0", processor=("made_up", "dreamt_of"))
    with pytest.raises(DeviceError) as caught:
        check_needs(needs, device="cpu")
    assert "one of made_up, dreamt_of" in str(caught.value)
    assert platform.machine() in str(caught.value)
    assert "convert with --precision fp32" in str(caught.value)


def test_one_of_the_needed_features_is_enough() -> None:
    features = session.processor_features()
    if features is None:
        pytest.skip("this system does not tell what its processor has")
    check_needs(Needs(onnxruntime="1.32.0", processor=("made_up", min(features))), device="cpu")


def test_an_onnxruntime_that_is_too_old_is_refused_with_both_versions() -> None:
    installed = load_onnxruntime().__version__
    with pytest.raises(DeviceError, match=rf"needs onnxruntime 99\.0\.1 or newer, installed is {installed}; update it"):
        check_needs(Needs(onnxruntime="99.0.1"), device="cpu")


def test_versions_are_compared_as_numbers() -> None:
    check_needs(Needs(onnxruntime="1.3.0"), device="cpu")  # as text, 1.3 would come after 1.23


def test_a_package_that_needs_nothing_runs_on_any_processor() -> None:
    check_needs(Needs(onnxruntime="1.32.0"), device="cpu")


# Processors


def test_the_affinity_mask_counts() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity masks")
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{one}}}); from runtime.session import *; print(available_processors())"
    )
    assert run_python(code) == "1"


def quota_of(tmp_path: Path, membership: str, **files: str) -> float | None:
    """The quota in a tree of control groups; double underscores in a file's name stand for slashes."""
    root = tmp_path / "cgroup"
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cpu_cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    (tmp_path / "membership").write_text(membership + "\n")
    return session._control_group_quota(root, tmp_path / "membership")


def test_version_2_quota_over_period(tmp_path: Path) -> None:
    assert quota_of(tmp_path, "0::/app", app__cpu_max="150000 100000") == 1.5


def test_version_2_max_is_no_limit(tmp_path: Path) -> None:
    assert quota_of(tmp_path, "0::/app", app__cpu_max="max 100000") is None


def test_the_tightest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    files = {"a__cpu_max": "200000 100000", "a__b__cpu_max": "max 100000", "a__b__c__cpu_max": "400000 100000"}
    assert quota_of(tmp_path, "0::/a/b/c", **files) == 2.0


def test_a_neighbouring_group_does_not_count(tmp_path: Path) -> None:
    assert quota_of(tmp_path, "0::/a", a__cpu_max="max 100000", b__cpu_max="100000 100000") is None


def test_a_group_that_the_container_does_not_see_falls_back_to_its_root(tmp_path: Path) -> None:
    assert quota_of(tmp_path, "0::/docker/1234", cpu_max="300000 100000") == 3.0


def test_version_1_quota_over_period(tmp_path: Path) -> None:
    files = {"cpu__app__cpu_cfs_quota_us": "250000", "cpu__app__cpu_cfs_period_us": "100000"}
    assert quota_of(tmp_path, "5:memory:/other\n4:cpu,cpuacct:/app", **files) == 2.5


def test_version_1_minus_one_is_no_limit(tmp_path: Path) -> None:
    files = {"cpu__app__cpu_cfs_quota_us": "-1", "cpu__app__cpu_cfs_period_us": "100000"}
    assert quota_of(tmp_path, "4:cpu,cpuacct:/app", **files) is None


@pytest.mark.parametrize("content", ["", "100000", "many 100000", "1 2 3"])
def test_a_quota_that_cannot_be_read_is_no_limit(tmp_path: Path, content: str) -> None:
    assert quota_of(tmp_path, "0::/app", app__cpu_max=content) is None


def test_no_control_groups_is_no_limit(tmp_path: Path) -> None:
    assert session._control_group_quota(tmp_path, tmp_path / "absent") is None


@pytest.mark.parametrize(("quota", "processors"), [(0.5, 1), (1.5, 1), (None, 8), (3.0, 3), (100.0, 8)])
def test_processors_are_the_mask_cut_to_the_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, processors: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(8)), raising=False)
    monkeypatch.setattr(session, "_control_group_quota", lambda: quota)
    assert available_processors() == processors


# onnxruntime

TELEMETRY_AT_IMPORT = """
import os, sys
import runtime.session
assert "onnxruntime" not in sys.modules, "imported before its telemetry was switched off"

class Watcher:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print(os.environ.get("ORT_DISABLE_TELEMETRY"))

sys.meta_path.insert(0, Watcher())
runtime.session.load_onnxruntime()
"""


def test_telemetry_is_off_before_onnxruntime_is_imported() -> None:
    assert run_python(TELEMETRY_AT_IMPORT) == "1"


def test_what_the_application_says_of_telemetry_stands() -> None:
    assert run_python(TELEMETRY_AT_IMPORT, ORT_DISABLE_TELEMETRY="0") == "0"


def test_an_onnxruntime_that_does_not_import_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceError, match=r"onnxruntime does not import \(.*\); .*pip install 'gpt2-edge\[cpu\]'"):
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
