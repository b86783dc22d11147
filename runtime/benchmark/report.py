"""From runs to rows, and from rows to a table, JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from ..package import Manifest
from .distribution import Distribution, relative_spread
from .engine import EngineRun, Loaded, Loads
from .limits import bytes_per_step
from .timing import RunTimes
from .workload import Workload

Case: TypeAlias = tuple[int, int, int, int]
"""Threads, batch, tokens of the prompt, new tokens."""

NOISY_SPREAD = 0.10
"""Middle half of the runs' medians, as a share of their median: beyond it a row is called noisy."""

FEWEST_FOR = {"p90": 10, "p95": 20, "p99": 100}
"""Values that a percentile needs: with fewer it is close to the largest value, whatever its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One package, one workload, one number of threads. Times in milliseconds; see `timing.DEFINITIONS`."""

    package: str
    precision: str
    threads: int
    batch: int
    prompt_tokens: int  # the median, where prompts were given
    new_tokens: int
    runs: int
    ttft_ms: Distribution
    ttft_ids_ms: Distribution
    itl_ms: Distribution | None  # these three: None where one token is written
    tpot_ms: Distribution | None
    e2el_ms: Distribution
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    peak_rss_bytes: int | None
    load_ms: float | None
    load_cold_ms: float | None
    load_peak_rss_bytes: int | None
    disk_bytes: int
    bytes_per_step: float | None
    memory_gb_per_s: float | None
    share_of_achievable: float | None
    warnings: tuple[str, ...]
    raw: dict[str, list[Any]]  # ttft_ms, ttft_ids_ms, load [runs], itl_ms [runs][new tokens - 1]

    def __str__(self) -> str:
        return (
            f"{self.package}, threads {self.threads}, batch {self.batch}, prompt {self.prompt_tokens}, "
            f"new tokens {self.new_tokens}"
        )

    @property
    def case(self) -> Case:
        """What another report must have run to be compared with."""
        return self.threads, self.batch, self.prompt_tokens, self.new_tokens


def row_of(
    workload: Workload,
    runs: Sequence[EngineRun],
    *,
    name: str,
    manifest: Manifest,
    threads: int,
    loaded: Loaded,
    loads: Loads | None,
    memory_gb_per_s: float | None,
) -> Row:
    """What the runs of one workload on one engine come to."""
    times = [run.times for run in runs]
    gaps = [gap for run in times for gap in run.itl_ms]
    itl = Distribution.of(gaps) if gaps else None
    tpot = Distribution.of([sum(run.itl_ms) / len(run.itl_ms) for run in times]) if gaps else None
    ttft_ids = Distribution.of([run.ttft_ids_ms for run in times])
    prompt_tokens = Distribution.of([float(length) for run in times for length in run.prompt_tokens]).p50
    step_bytes = bytes_per_step(manifest, times)
    reached = step_bytes / itl.p50 / 1e6 if itl and step_bytes else None  # GB/s
    return Row(
        package=name,
        precision=manifest.precision,
        threads=threads,
        batch=workload.batch,
        prompt_tokens=round(prompt_tokens),
        new_tokens=workload.new_tokens,
        runs=len(runs),
        ttft_ms=Distribution.of([run.ttft_ms for run in times]),
        ttft_ids_ms=ttft_ids,
        itl_ms=itl,
        tpot_ms=tpot,
        e2el_ms=Distribution.of([run.e2el_ms for run in times]),
        prefill_tokens_per_s=workload.batch * prompt_tokens / ttft_ids.p50 * 1e3,
        decode_tokens_per_s=workload.batch / tpot.p50 * 1e3 if tpot else None,
        peak_rss_bytes=max((run.peak_rss_bytes for run in runs if run.peak_rss_bytes), default=None),
        load_ms=Distribution.of(loads.warm_ms).p50 if loads and loads.warm_ms else None,
        load_cold_ms=loads.cold_ms if loads else None,
        load_peak_rss_bytes=loaded.load_peak_rss_bytes,
        disk_bytes=sum(entry.bytes for entry in manifest.files.values()),
        bytes_per_step=step_bytes,
        memory_gb_per_s=memory_gb_per_s,
        share_of_achievable=reached / memory_gb_per_s if reached and memory_gb_per_s else None,
        warnings=tuple(_row_warnings(times, loads)),
        raw={
            "ttft_ms": [run.ttft_ms for run in times],
            "ttft_ids_ms": [run.ttft_ids_ms for run in times],
            "itl_ms": [list(run.itl_ms) for run in times],
            "load": [run.load for run in runs],
        },
    )


def _row_warnings(times: Sequence[RunTimes], loads: Loads | None) -> list[str]:
    warnings = []
    spreads = {"first token": [run.ttft_ids_ms for run in times]}
    if times[0].itl_ms:
        spreads["decode"] = [Distribution.of(run.itl_ms).p50 for run in times]
    for what, values in spreads.items():
        if len(values) > 1 and (spread := relative_spread(values)) > NOISY_SPREAD:
            warnings.append(f"noisy: the middle half of the runs' {what} times is {spread:.0%} of their median wide")
    if loads and loads.cold_ms is None:
        held = loads.cold_resident_share
        why = "nothing tells what it holds" if held is None else f"it still holds {held:.0%} of the files"
        warnings.append(f"no cold load: the page cache did not drop the files ({why})")
    return warnings


def enough_values(name: str, distribution: Distribution) -> bool:
    """Whether a percentile by this name means what it says."""
    return distribution.n >= FEWEST_FOR.get(name, 1)


COLUMNS = (
    ("package", "package"),
    ("threads", "threads"),
    ("batch", "batch"),
    ("prompt", "prompt_tokens"),
    ("new", "new_tokens"),
    ("TTFT ms p50", "ttft_ms.p50"),
    ("max", "ttft_ms.max"),
    ("ITL ms p50", "itl_ms.p50"),
    ("p99", "itl_ms.p99"),
    ("prefill tok/s", "prefill_tokens_per_s"),
    ("decode tok/s", "decode_tokens_per_s"),
    ("of limit", "share_of_achievable"),
    ("peak MB", "peak_rss_bytes"),
    ("load ms", "load_ms"),
    ("cold", "load_cold_ms"),
)
"""The table: a heading, and where in a row its value stands."""


def table(rows: Sequence[Row]) -> str:
    """Columns of text, numbers to the right."""
    lines = [[heading for heading, _ in COLUMNS], *(_cells(row) for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(rows: Sequence[Row], receipt: dict[str, Any]) -> str:
    """The table in Markdown, the receipt below it."""
    head = [heading for heading, _ in COLUMNS]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *(_cells(row) for row in rows)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\n{receipt_line(receipt)}\n"


def receipt_line(receipt: dict[str, Any]) -> str:
    """Where and how the figures were measured, in one sentence."""
    machine, versions, noise = receipt["machine"], receipt["versions"], receipt["noise"]
    shares = [
        f"{noise[name]:.0%} {what}"
        for name, what in (("others_share", "of its time to others"), ("stolen_share", "stolen"))
        if noise[name] is not None
    ]
    circumstances = {"prepacked": "prepacked weights", "narrow_activations": "7-bit activations"}
    sessions = receipt["sessions"].values()
    runs_on = [
        *dict.fromkeys(provider for session in sessions for provider in session["providers"]),
        *(words for name, words in circumstances.items() if receipt[name]),
        *dict.fromkeys(f"onnxruntime {session['versions']['onnxruntime']}" for session in sessions),
    ]
    return (
        f"{receipt['date']}, {machine['processor']}, {machine['processors']} processors, "
        f"{', '.join(runs_on)}, python {versions['python']}, "
        f"{receipt['runs']} runs over {receipt['loads']} loads, {receipt['warmup']} discarded behind each, load "
        f"average {noise['load_average_before']:.2f} to {noise['load_average_after']:.2f}"
        + "".join(f", {share}" for share in shares)
    )


def csv_text(rows: Sequence[Row]) -> str:
    """One line a row; a distribution has a column for each of its figures."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for values in flat for name in values))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in asdict(row).items():
        if isinstance(value, dict):
            if name != "raw":
                values |= {f"{name}.{figure}": each for figure, each in value.items()}
        elif name == "warnings":
            values[name] = "; ".join(value)
        else:
            values[name] = value
    return values


def _cells(row: Row) -> list[str]:
    values = _flat(row)
    return [_cell(place, values.get(place)) for _, place in COLUMNS]


def _cell(place: str, value: Any) -> str:
    if value is None:
        return "-"
    if place.endswith("_bytes"):
        return f"{value / 1e6:,.0f}"
    if place == "share_of_achievable":
        return f"{value:.0%}"
    if isinstance(value, float):
        return f"{value:,.{2 if value < 10 else 1 if value < 1000 else 0}f}"
    return str(value)
