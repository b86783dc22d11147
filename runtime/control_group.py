"""What a container, or any other control group, lets this process use: the host's own numbers would be wrong there.

Source: Linux, Documentation/admin-guide/cgroup-v2 (cpu.max, memory.max, memory.swap.max) and cgroup-v1
(cpu.cfs_quota_us, memory.limit_in_bytes, memory.memsw.limit_in_bytes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")

UNLIMITED_BYTES = 1 << 62
"""Version 1 writes a number near 2^63 where there is no limit."""


def processor_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """Processors' worth of time, the tightest limit on the way up; None: no limit."""
    return _tightest("cpu", _quota_of, root, membership)


def memory_limit_bytes(root: Path = ROOT, membership: Path = MEMBERSHIP, meminfo: Path = MEMINFO) -> int | None:
    """Memory and swap beyond which the system kills a process of the group; None: no limit."""
    swap = _total_swap_bytes(meminfo)
    limit = _tightest("memory", lambda folder: _memory_of(folder, swap), root, membership)
    return None if limit is None else int(limit)


def _tightest(controller: str, stated: Callable[[Path], float | None], root: Path, membership: Path) -> float | None:
    """The smallest of what the groups that this process is in, and those around them, state."""
    limits = []
    for folder in _groups(controller, root, membership):
        try:
            limit = stated(folder)
        except (OSError, ValueError):
            continue
        if limit is not None:
            limits.append(limit)
    return min(limits, default=None)


def _groups(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """Folders of this process's groups and of all around them, of version 2 and of version 1."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        group = base / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(base))


def _quota_of(folder: Path) -> float | None:
    """The quota of processor time that one group's folder states."""
    if (folder / "cpu.max").is_file():
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    else:
        quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
        period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8").strip()
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _memory_of(folder: Path, swap_bytes: int) -> int | None:
    """The bytes of memory and swap that one group's folder states, on a machine with so much swap."""
    if (folder / "memory.max").is_file():
        memory = (folder / "memory.max").read_text(encoding="utf-8").strip()
        swap_file = folder / "memory.swap.max"
        swap = swap_file.read_text(encoding="utf-8").strip() if swap_file.is_file() else "max"
        return None if memory == "max" else int(memory) + min(swap_bytes, swap_bytes if swap == "max" else int(swap))
    memory = (folder / "memory.limit_in_bytes").read_text(encoding="utf-8").strip()
    both_file = folder / "memory.memsw.limit_in_bytes"
    both = both_file.read_text(encoding="utf-8").strip() if both_file.is_file() else str(UNLIMITED_BYTES)
    limit = min(int(memory) + swap_bytes, int(both))
    return None if limit >= UNLIMITED_BYTES else limit


def _total_swap_bytes(meminfo: Path) -> int:
    try:
        lines = meminfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("SwapTotal:")), 0)
