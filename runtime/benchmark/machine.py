"""The machine that was measured: what it is, and what else it was doing meanwhile. Read from Linux's /proc."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from ..control_group import memory_limit_bytes
from ..processor import available_processors, processor_features

GIB = 1 << 30
TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass(frozen=True, slots=True)
class Machine:
    """Hardware as this process sees it."""

    processor: str
    architecture: str
    processors: int  # that this process may use
    memory_bytes: int | None
    kernel: str
    fingerprint: str

    @classmethod
    def here(cls) -> Machine:
        """This one. The fingerprint is of the hardware alone: an update of software leaves it as it is."""
        processor, processors, memory = processor_name(), available_processors(), total_memory_bytes()
        features = " ".join(sorted(processor_features() or ()))
        memory_gib = "" if memory is None else str(round(memory / GIB))
        hardware = "\n".join([processor, platform.machine(), str(processors), memory_gib, features])
        return cls(
            processor=processor,
            architecture=platform.machine(),
            processors=processors,
            memory_bytes=memory,
            kernel=platform.release(),
            fingerprint=hashlib.sha256(hardware.encode()).hexdigest()[:16],
        )


@dataclass(frozen=True, slots=True)
class Noise:
    """What else ran. Shares are of the time of all processors of this machine, container or not, 0 to 1."""

    load_average_before: float | None
    load_average_after: float | None
    others_share: float | None  # busy with other processes than the measured ones
    stolen_share: float | None  # taken by the hypervisor for other machines


class NoiseMeter:
    """Counts processor time from its making to `read`, our own and that of the children that have ended by then."""

    def __init__(self) -> None:
        self._load = _load_average()
        self._before, self._own_before = _processor_ticks(), _own_ticks()

    def read(self) -> Noise:
        """What ran meanwhile besides us."""
        after, own = _processor_ticks(), _own_ticks() - self._own_before
        others = stolen = None
        if self._before and after and after.total > self._before.total:
            total = after.total - self._before.total
            busy = after.busy - self._before.busy
            others = max(0.0, (busy - own) / total)
            stolen = (after.stolen - self._before.stolen) / total
        return Noise(self._load, _load_average(), others, stolen)


def processor_name() -> str:
    """As the processor calls itself."""
    for name in ("model name", "Model", "Hardware"):  # x86; boards with ARM
        if value := _field(Path("/proc/cpuinfo"), name):
            return value
    return platform.processor() or platform.machine()


def total_memory_bytes() -> int | None:
    return _kib(Path("/proc/meminfo"), "MemTotal")


def available_memory_bytes() -> int | None:
    """What programs can still take without swapping, by the kernel's estimate, cut to the control group's limit."""
    known = [size for size in (_kib(Path("/proc/meminfo"), "MemAvailable"), memory_limit_bytes()) if size is not None]
    return min(known, default=None)


def peak_rss_bytes() -> int | None:
    """Highest resident memory of this process since it began, or since `reset_peak_rss`."""
    return _kib(Path("/proc/self/status"), "VmHWM")


def reset_peak_rss() -> None:
    """Let the peak begin at what is resident now; where the kernel does not allow that, the peak stays the process's.

    Source: proc_pid_clear_refs(5), value 5.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


@dataclass(frozen=True, slots=True)
class _Ticks:
    total: int
    busy: int
    stolen: int


def _processor_ticks() -> _Ticks | None:
    """Source: proc_stat(5); the guests' time is in the users' already."""
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return None
    user, nice, system, idle, waiting, interrupts, soft, stolen = map(int, line.split()[1:9])
    busy = user + nice + system + interrupts + soft
    return _Ticks(total=busy + idle + waiting + stolen, busy=busy, stolen=stolen)


def _own_ticks() -> int:
    """Processor time of this process, and of the children that it has waited for."""
    times = os.times()
    return round((times.user + times.system + times.children_user + times.children_system) * TICKS_PER_S)


def _load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _kib(path: Path, name: str) -> int | None:
    value = _field(path, name)
    return int(value.split()[0]) * 1024 if value else None


def _field(path: Path, name: str) -> str | None:
    """The first `name: value` of a file; None where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == name and value.strip():
            return value.strip()
    return None
