"""What is too slow: limits that rows must keep, and whether one package is slower than another, or than it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import RequestError
from .distribution import Distribution, Interval, ratio_of_medians, ratio_of_rounds
from .report import Row, enough_values

STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")
TIMES = ("ttft", "ttft_ids", "itl", "tpot", "e2el")
AT_MOST = ("load_ms", "load_cold_ms", "peak_rss_bytes", "load_peak_rss_bytes", "disk_bytes")
AT_LEAST = ("prefill_tokens_per_s", "decode_tokens_per_s", "share_of_achievable")

ERROR_RATE = 0.01
"""How often, at most, equal packages may be called different, all rows and figures together, were rounds independent.
Noise is not: hence a tolerance too."""

TOLERANCE = 0.02
"""A ratio this close to 1 is no difference: two loads of one package lie differently in memory, and differ by that."""

FEWEST_ROUNDS = 8
"""Below it an interval by bootstrap is too narrow."""

SAME_MACHINE_DRIFT = 0.10
OTHER_MACHINE_DRIFT = 0.30
"""How far a probe may misjudge the machine between then and now, as a share: added to the tolerance."""

Verdict = Literal["slower", "faster", "no difference"]


@dataclass(frozen=True, slots=True)
class Limit:
    """A value that every row must keep."""

    name: str
    value: float

    def kept_by(self, row: Row) -> tuple[bool, float]:
        """Whether, and the row's own value.

        Raises:
            RequestError: the row does not have this figure.
        """
        measured = _figure(row, self.name)
        if measured is None:
            raise RequestError(f"--slo {self.name}: {row.package} has no such figure in a run of this kind")
        return (measured >= self.value if self.name in AT_LEAST else measured <= self.value), measured

    def doubt(self, row: Row) -> str | None:
        """Why the figure is not what its name promises, if so."""
        metric, _, statistic = self.name.removesuffix("_ms").rpartition("_")
        distribution = getattr(row, f"{metric}_ms", None) if metric in TIMES else None
        if isinstance(distribution, Distribution) and not enough_values(statistic, distribution):
            return (
                f"{self.name} is read off {distribution.n} values, which hardly differs from their maximum; see --runs"
            )
        return None


def parse_limits(text: str) -> list[Limit]:
    """`ttft_p95_ms=500,itl_p99_ms=60` -> limits.

    Raises:
        RequestError: a figure that is not known, or a value that is no number above 0.
    """
    limits = []
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in figure_names():
            raise RequestError(
                f"--slo {part.strip()!r}: no figure {name!r}, expected {'|'.join(TIMES)} _ {'|'.join(STATISTICS)} _ms "
                f"(as ttft_p95_ms=500), or one of {', '.join((*AT_MOST, *AT_LEAST))}"
            )
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not 0 < number < float("inf"):
            raise RequestError(f"--slo {part.strip()!r}: {value!r} is no number above 0, expected as {name}=500")
        limits.append(Limit(name, number))
    return limits


def figure_names() -> tuple[str, ...]:
    return (*(f"{metric}_{statistic}_ms" for metric in TIMES for statistic in STATISTICS), *AT_MOST, *AT_LEAST)


def _figure(row: Row, name: str) -> float | None:
    if name in AT_MOST + AT_LEAST:
        value: float | None = getattr(row, name)
        return value
    metric, _, statistic = name.removesuffix("_ms").rpartition("_")
    distribution: Distribution | None = getattr(row, f"{metric}_ms")
    return getattr(distribution, statistic) if distribution else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of a row against the baseline's."""

    package: str
    baseline: str
    threads: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    figure: Literal["ttft_ids_ms", "itl_ms"]
    ratio: Interval  # of times: above 1 is slower
    confidence: float
    tolerance: float
    normalised_by: float  # what the ratio of times was multiplied by: 1, or the ratio of the machine's speeds

    @property
    def verdict(self) -> Verdict:
        if self.ratio.low > 1 + self.tolerance:
            return "slower"
        return "faster" if self.ratio.high < 1 / (1 + self.tolerance) else "no difference"

    def __str__(self) -> str:
        return (
            f"{self.package} against {self.baseline}, threads {self.threads}, batch {self.batch}, prompt "
            f"{self.prompt_tokens}, {self.figure.removesuffix('_ms')}: {self.ratio.value:.3f} times "
            f"({self.ratio.low:.3f} to {self.ratio.high:.3f} at {self.confidence:.2%}, tolerance "
            f"{self.tolerance:.0%}): {self.verdict}"
        )


def run_figures(raw: Mapping[str, Sequence[Any]]) -> dict[Literal["ttft_ids_ms", "itl_ms"], list[float]]:
    """What is compared: a row's time to first token of each run, and each run's median gap."""
    figures: dict[Literal["ttft_ids_ms", "itl_ms"], list[float]] = {"ttft_ids_ms": list(raw["ttft_ids_ms"])}
    if all(raw["itl_ms"]):
        figures["itl_ms"] = [float(np.median(gaps)) for gaps in raw["itl_ms"]]
    return figures


def compare_packages(
    rows: Sequence[Row], baselines: Sequence[Row], *, tolerance: float = TOLERANCE
) -> list[Comparison]:
    """Each row against the baseline's row of the same case, measured in the same rounds."""
    return _compare(
        [(row, raw) for row in rows for raw in baselines if raw.case == row.case],
        ratio_of_rounds,
        tolerance=tolerance,
        speeds=dict.fromkeys(("ttft_ids_ms", "itl_ms"), 1.0),
    )


def compare_with_report(
    rows: Sequence[Row], receipt: Mapping[str, Any], path: Path, *, other_machine: bool, tolerance: float = TOLERANCE
) -> list[Comparison]:
    """Each row against an earlier report, times multiplied by what each machine's probes say of its speed.

    Decoding is judged by the speed of memory, the first token by that of matrix products. The tolerance is widened by
    what such probes may be wrong by.

    Args:
        rows, receipt: of this report.
        path: what `--json` wrote.
        other_machine: compare though the hardware is another.
    Raises:
        RequestError: the file is no report, is of another machine, or holds none of these cases.
    """
    report = read_report(path)
    theirs, ours = report["receipt"]["machine"]["fingerprint"], receipt["machine"]["fingerprint"]
    if theirs != ours and not other_machine:
        raise RequestError(
            f"{path} was measured on another machine ({report['receipt']['machine']['processor']}, fingerprint "
            f"{theirs}; this one has {ours}); measure the baseline here, or accept wide limits with --other-machine"
        )
    pairs = []
    for row in rows:
        found = [
            old
            for old in report["rows"]
            if (old["threads"], old["batch"], old["prompt_tokens"], old["new_tokens"]) == row.case
        ]
        found = [old for old in found if old["package"] == row.package] or found
        if len({old["package"] for old in found}) > 1:
            raise RequestError(
                f"{path} holds {', '.join(sorted({old['package'] for old in found}))}, none of which is {row.package}; "
                "expected one package, or one of the same name"
            )
        pairs += [(row, _baseline_row(row, old)) for old in found]
    if not pairs:
        raise RequestError(
            f"{path} holds none of the cases that were run now; run the same --prompt-tokens, --new-tokens, --batch "
            "and --threads"
        )
    drift = SAME_MACHINE_DRIFT if theirs == ours else OTHER_MACHINE_DRIFT
    old_speed, speed = report["receipt"]["multiply_gflops"], receipt["multiply_gflops"]
    return _compare(pairs, ratio_of_medians, tolerance=tolerance + drift, speeds={"ttft_ids_ms": speed / old_speed})


@dataclass(frozen=True, slots=True)
class _BaselineRow:
    package: str
    raw: Mapping[str, Sequence[Any]]
    memory_gb_per_s: float | None


def _baseline_row(row: Row, old: Mapping[str, Any]) -> _BaselineRow:
    return _BaselineRow(f"{old['package']} as it was", old["raw"], old["memory_gb_per_s"])


def _compare(
    pairs: Sequence[tuple[Row, Row | _BaselineRow]],
    ratio: Callable[..., Interval],
    *,
    tolerance: float,
    speeds: Mapping[str, float],
) -> list[Comparison]:
    both = [
        (row, baseline, figure, values, run_figures(baseline.raw)[figure])
        for row, baseline in pairs
        for figure, values in run_figures(row.raw).items()
        if figure in run_figures(baseline.raw)
    ]
    confidence = 1 - ERROR_RATE / max(1, len(both))
    comparisons = []
    for row, baseline, figure, values, base in both:
        # a file's decode times are judged by the memory of its own row, whose working set the probe had
        speed = speeds.get(figure) or (row.memory_gb_per_s or 1.0) / (baseline.memory_gb_per_s or 1.0)
        found = ratio(values, base, confidence=confidence)
        comparisons.append(
            Comparison(
                package=row.package,
                baseline=baseline.package,
                threads=row.threads,
                batch=row.batch,
                prompt_tokens=row.prompt_tokens,
                new_tokens=row.new_tokens,
                figure=figure,
                ratio=Interval(found.value * speed, found.low * speed, found.high * speed),
                confidence=confidence,
                tolerance=tolerance,
                normalised_by=speed,
            )
        )
    return comparisons


def read_report(path: Path) -> dict[str, Any]:
    """What `--json` wrote.

    Raises:
        RequestError: the file cannot be read, or is no report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"--baseline {path}: is neither a package nor a report ({error})") from error
    try:
        float(report["receipt"]["multiply_gflops"])
        str(report["receipt"]["machine"]["fingerprint"]), str(report["receipt"]["machine"]["processor"])
        for row in report["rows"]:
            run_figures(row["raw"])
            _ = [
                row[name] for name in ("package", "threads", "batch", "prompt_tokens", "new_tokens", "memory_gb_per_s")
            ]
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"--baseline {path}: is no report of python -m runtime.benchmark --json (missing or malformed: {error})"
        ) from error
    result: dict[str, Any] = report
    return result
