"""The processor: its features, and how many of it this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

from .control_group import processor_quota

X86 = ("x86_64", "amd64")


def processor_features() -> frozenset[str] | None:
    """Feature flags as Linux names them; None where no /proc/cpuinfo tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return None


def available_processors() -> int:
    """Processors that this process may use: its affinity mask, cut to the quota of its control group.

    The host's count would be wrong in a container: threads beyond the quota only wait for each other.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = processor_quota()
    return allowed if quota is None else max(1, min(allowed, math.floor(quota)))
