"""The limits of a container: the tightest on the way up, in either version of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.control_group import memory_limit_bytes, processor_quota

MIB = 1 << 20


def quota_of(tmp_path: Path, membership: str, **files: str) -> float | None:
    """The quota in a tree of control groups; double underscores in a file's name stand for slashes."""
    root = tmp_path / "cgroup"
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cpu_cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    (tmp_path / "membership").write_text(membership + "\n")
    return processor_quota(root, tmp_path / "membership")


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
    assert processor_quota(tmp_path, tmp_path / "absent") is None


def limit_of(tmp_path: Path, membership: str, files: dict[str, str], *, swap_mib: int = 0) -> int | None:
    """The limit of memory in a tree of control groups, on a machine with so much swap."""
    root = tmp_path / "cgroup"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    (tmp_path / "membership").write_text(membership + "\n")
    (tmp_path / "meminfo").write_text(f"MemTotal: 1000 kB\nSwapTotal:    {swap_mib * 1024} kB\n")
    return memory_limit_bytes(root, tmp_path / "membership", tmp_path / "meminfo")


def test_version_2_the_tightest_limit_of_memory_counts(tmp_path: Path) -> None:
    files = {"a/memory.max": str(512 * MIB), "a/b/memory.max": "max", "memory.max": str(900 * MIB)}
    assert limit_of(tmp_path, "0::/a/b", files) == 512 * MIB


@pytest.mark.parametrize(("allowed", "added"), [("max", 64), ("0", 0), (str(16 * MIB), 16), (str(999 * MIB), 64)])
def test_version_2_swap_counts_as_far_as_it_is_there_and_allowed(tmp_path: Path, allowed: str, added: int) -> None:
    files = {"a/memory.max": str(512 * MIB), "a/memory.swap.max": allowed}
    assert limit_of(tmp_path, "0::/a", files, swap_mib=64) == (512 + added) * MIB


@pytest.mark.parametrize("files", [{}, {"a/memory.max": "max"}, {"a/memory.max": "lots"}])
def test_version_2_no_limit_of_memory(tmp_path: Path, files: dict[str, str]) -> None:
    assert limit_of(tmp_path, "0::/a", files) is None


def test_version_1_memory_and_swap_together(tmp_path: Path) -> None:
    files = {"memory/a/memory.limit_in_bytes": str(512 * MIB), "memory/a/memory.memsw.limit_in_bytes": str(600 * MIB)}
    assert limit_of(tmp_path, "3:memory:/a", files, swap_mib=1000) == 600 * MIB
    assert limit_of(tmp_path, "3:memory:/a", files) == 512 * MIB


def test_version_1_a_huge_number_is_no_limit(tmp_path: Path) -> None:
    assert limit_of(tmp_path, "3:memory:/a", {"memory/a/memory.limit_in_bytes": "9223372036854771712"}) is None
