"""Rounds that alternate: every engine runs a workload before any runs the next, so that none ever follows itself."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np

from ..activations import NARROW
from ..errors import RequestError
from ..needs import activations_here
from .engine import Engine, EngineRun, Loads, Placement, time_loads
from .limits import StepModel
from .machine import Machine, Noise, NoiseMeter, available_memory_bytes
from .page_cache import HOW_COLD
from .probes import LARGEST_READ_BYTES, multiply_gflops, read_gb_per_s
from .report import Row, row_of
from .workload import Workload

Progress = Callable[[str], None]

BUSY_SHARE = 0.10
"""Of the processors' time: what others may take before the report says so."""

PROBE_DRIFT = 0.15
"""How far the memory's speed may move between start and end before the report says so."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A package at a place, and what its rows are called."""

    name: str
    placement: Placement


@dataclass(frozen=True, slots=True)
class Measured:
    """All that was measured. `runs[contender][workload]` are the runs, in the order of the rounds."""

    rows: list[list[Row]]  # by contender, by workload
    runs: list[list[list[EngineRun]]]
    receipt: dict[str, Any]

    def step_model(self, contender: int) -> StepModel:
        """Fit one contender's decode steps; errors as `StepModel.fit`."""
        return StepModel.fit([[run.times for run in runs] for runs in self.runs[contender]])


def measure(
    contenders: Sequence[Contender],
    workloads: Sequence[Workload],
    *,
    runs: int,
    loads: int,
    warmup: int,
    load_runs: int,
    progress: Progress = lambda _line: None,
) -> Measured:
    """Load every contender in a process of its own, run all workloads in alternating rounds, and load them anew.

    Where a process comes to lie in memory decides over several percent of its speed for as long as it lives, and the
    one that is loaded first is slower more often than not: so all are loaded several times, in turn the other way
    round. Within a load the order stays: who ran just before starts a prompt 8% faster.

    Args:
        contenders, workloads: at least one each.
        runs: rounds that count, spread evenly over the loads.
        loads: how many times; at most `runs`.
        warmup: rounds behind each load that are discarded.
        load_runs: warm loads of each package that are timed, behind a cold one; 0 leaves load times out.
        progress: called with a line before each step.
    Raises:
        GPT2EdgeError: a package does not load, or a workload does not fit it.
        MachineError: a process died.
    """
    _refuse_what_does_not_fit(contenders)
    meter, started = NoiseMeter(), datetime.now(timezone.utc)
    timed_loads = [_loads(contender, load_runs, progress) for contender in contenders]
    probes = [_probe(contenders, workloads, progress)]
    done: list[list[list[EngineRun]]] = [[[] for _ in workloads] for _ in contenders]
    for load in range(loads):
        n_runs = len(range(load, runs, loads))
        with ExitStack() as stack:
            engines = {}
            order = range(len(contenders))[:: -1 if load % 2 else 1]
            for index in order:
                progress(f"load {load + 1} of {loads}: {contenders[index].name}")
                engines[index] = stack.enter_context(Engine(contenders[index].placement))
            for number in range(-warmup, n_runs):
                what = f"round {number + 1} of {n_runs}" if number >= 0 else "warming up"
                for place, workload in enumerate(workloads):
                    for index in order:
                        progress(f"load {load + 1} of {loads}, {what}: {contenders[index].name}, {workload}")
                        runs_of_this = done[index][place]
                        run = engines[index].run(workload, len(runs_of_this))
                        if number >= 0:
                            runs_of_this.append(replace(run, load=load))
    probes.append(_probe(contenders, workloads, progress))
    noise = meter.read()
    loaded = [engines[index].loaded for index in range(len(contenders))]
    rows = [
        [
            row_of(
                workload,
                done[index][place],
                name=contender.name,
                manifest=contender.placement.package.manifest,
                threads=contender.placement.threads,
                loaded=loaded[index],
                loads=timed_loads[index],
                memory_gb_per_s=max(probe.memory_gb_per_s[_working_set(contender, workload)] for probe in probes),
            )
            for place, workload in enumerate(workloads)
        ]
        for index, contender in enumerate(contenders)
    ]
    receipt = {
        "date": started.isoformat(timespec="seconds"),
        "sessions": {
            contender.name: each.receipt.to_dict() for contender, each in zip(contenders, loaded, strict=True)
        },
        "narrow_activations": any(
            activations_here(each.placement.package.manifest.needs) == NARROW for each in contenders
        ),
        "prepacked": contenders[0].placement.prepacked_dir is not None,
        "machine": asdict(Machine.here()),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "runs": runs,
        "loads": loads,
        "warmup": warmup,
        "cold_loads": HOW_COLD,
        "multiply_gflops": max(probe.multiply_gflops for probe in probes),
        "noise": asdict(noise),
        "warnings": _warnings(noise, *probes),
    }
    return Measured(rows, done, receipt)


@dataclass(frozen=True, slots=True)
class _Probe:
    """What the machine could do at one moment; the memory's speed by (threads, bytes of the working set)."""

    memory_gb_per_s: dict[tuple[int, int], float]
    multiply_gflops: float


def _working_set(contender: Contender, workload: Workload) -> tuple[int, int]:
    """Threads, and about how much they read for one step, to two digits: as large a buffer is what a probe reads."""
    manifest = contender.placement.package.manifest
    tokens = workload.batch * (workload.prompt_tokens or manifest.config.n_ctx // 2)
    size = min(manifest.decode_weight_bytes + manifest.cache_bytes_per_token * tokens, LARGEST_READ_BYTES)
    return contender.placement.threads, int(float(f"{size:.1e}"))


def _probe(contenders: Sequence[Contender], workloads: Sequence[Workload], progress: Progress) -> _Probe:
    progress("probing the machine")
    wanted = {_working_set(contender, workload) for contender in contenders for workload in workloads}
    available = available_memory_bytes()
    return _Probe(
        {(threads, size): read_gb_per_s(size, threads=threads, available_bytes=available) for threads, size in wanted},
        multiply_gflops(),
    )


def _loads(contender: Contender, runs: int, progress: Progress) -> Loads | None:
    if not runs:
        return None
    progress(f"timing loads of {contender.name}")
    return time_loads(contender.placement, runs)


def _refuse_what_does_not_fit(contenders: Sequence[Contender]) -> None:
    """All packages are open at once: what swaps would be measured, not the packages."""
    available = available_memory_bytes()
    needed = sum(
        entry.bytes for contender in contenders for entry in contender.placement.package.manifest.files.values()
    )
    if available is not None and needed > available:
        raise RequestError(
            f"{len(contenders)} packages of {needed / 1e9:.1f} GB in all would be open at once, {available / 1e9:.1f} "
            "GB of memory are available; measure fewer packages or thread counts at once"
        )


def _warnings(noise: Noise, before: _Probe, after: _Probe) -> list[str]:
    warnings = []
    for share, what in ((noise.others_share, "other processes took"), (noise.stolen_share, "the hypervisor took")):
        if share is not None and share > BUSY_SHARE:
            warnings.append(f"noisy: {what} {share:.0%} of the processors' time; close other programs and run again")
    drifts = [after.memory_gb_per_s[place] / speed for place, speed in before.memory_gb_per_s.items()]
    if drifts and max(*drifts, 1 / min(drifts)) > 1 + PROBE_DRIFT:
        warnings.append(
            f"noisy: the memory's speed changed by {min(drifts) - 1:+.0%} to {max(drifts) - 1:+.0%} meanwhile"
        )
    return warnings
