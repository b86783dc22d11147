"""Whether a package is slower than another that runs in the same rounds, or than an earlier report says it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from ..errors import RequestError
from .distribution import Interval, ratio_of_medians, ratio_of_rounds
from .machine import Machine
from .report import Case, Row

FEWEST_ROUNDS = LOADS = 16
"""Loads of each package in a comparison, at least one round behind each. Two processes with the same 124M package
differed by 6.3% (standard deviation over 40 pairs of loads): the mean of 16 is known to 1.6%, and 10% stand out."""

ERROR_RATE = 0.05
"""How often, at most, equal packages may be called different, all rows and figures together, were the intervals exact.
By bootstrap from few loads they are not quite: hence a tolerance too, which makes it far rarer."""

TOLERANCE = 0.02
"""A ratio this close to 1 is no difference."""

SAME_MACHINE_DRIFT, OTHER_MACHINE_DRIFT = 0.10, 0.30
"""How far probes may misjudge the machine between then and now, as a share: added to the tolerance."""

Figure = Literal["ttft_ids_ms", "itl_ms"]
Verdict = Literal["slower", "faster", "no difference"]
Raw: TypeAlias = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of a row against the baseline's: medians of the gaps between tokens, and times to first token."""

    package: str
    baseline: str
    threads: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    figure: Figure
    ratio: Interval  # of times: above 1 is slower
    confidence: float
    tolerance: float
    normalised_by: float  # what the ratio of times was multiplied by: this machine's speed as a multiple of that one's

    @property
    def verdict(self) -> Verdict:
        if self.ratio.low > 1 + self.tolerance:
            return "slower"
        return "faster" if self.ratio.high < 1 / (1 + self.tolerance) else "no difference"

    def __str__(self) -> str:
        normalised = "" if self.normalised_by == 1 else f", times normalised by {self.normalised_by:.3f}"
        return (
            f"{self.package} against {self.baseline}, threads {self.threads}, batch {self.batch}, prompt "
            f"{self.prompt_tokens}, {self.figure.removesuffix('_ms')}: {self.ratio.value:.3f} times "
            f"({self.ratio.low:.3f} to {self.ratio.high:.3f} at {self.confidence:.2%}{normalised}, tolerance "
            f"{self.tolerance:.0%}): {self.verdict}"
        )


@dataclass(frozen=True, slots=True)
class _Pair:
    """One figure of each run, of a row and of its baseline."""

    row: Row
    baseline: str
    figure: Figure
    values: list[float]
    baseline_values: list[float]
    normalised_by: float = 1.0


def compare_packages(rows: Sequence[Row], baselines: Sequence[Row], *, tolerance: float) -> list[Comparison]:
    """Each row against the baseline's row of the same case, measured in the same rounds."""
    pairs = [
        _Pair(row, baseline.package, figure, values, base)
        for row in rows
        for baseline in baselines
        if baseline.case == row.case
        for figure, values, base in _figures_of_both(row.raw, baseline.raw)
    ]

    def ratio(pair: _Pair, confidence: float) -> Interval:
        loads = pair.row.raw["load"]
        return ratio_of_rounds(pair.values, pair.baseline_values, loads, confidence=confidence)

    return _judge(pairs, ratio, tolerance)


def compare_with_report(
    rows: Sequence[Row], receipt: Mapping[str, Any], report: Mapping[str, Any], *, tolerance: float
) -> list[Comparison]:
    """Each row against an earlier report, times multiplied by what each machine's probes say of its speed.

    Decoding is judged by the speed of memory at the row's own working set, the first token by that of matrix products.
    The tolerance is widened by what such probes may be wrong by.

    Args:
        rows, receipt: of this report.
        report: an earlier one, from `read_report`.
        tolerance: before it is widened.
    """
    then, now = report["receipt"], receipt
    pairs = []
    for row in rows:
        if old := _row_of_report(report, row.package, row.case):
            speeds: Mapping[Figure, float] = {
                "ttft_ids_ms": now["multiply_gflops"] / then["multiply_gflops"],
                "itl_ms": (row.memory_gb_per_s or 1.0) / old["memory_gb_per_s"],
            }
            pairs += [
                _Pair(row, f"{old['package']} of {then['date']}", figure, values, base, speeds[figure])
                for figure, values, base in _figures_of_both(row.raw, old["raw"])
            ]

    def ratio(pair: _Pair, confidence: float) -> Interval:
        found = ratio_of_medians(pair.values, pair.baseline_values, confidence=confidence)
        return Interval(*(each * pair.normalised_by for each in (found.value, found.low, found.high)))

    same_machine = then["machine"]["fingerprint"] == now["machine"]["fingerprint"]
    return _judge(pairs, ratio, tolerance + (SAME_MACHINE_DRIFT if same_machine else OTHER_MACHINE_DRIFT))


def read_report(path: Path) -> dict[str, Any]:
    """What `--json` wrote.

    Raises:
        RequestError: the file cannot be read, or is no report.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"--baseline {path}: is neither a package nor a report ({error})") from error
    try:
        _touch_all(report)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(
            f"--baseline {path}: is no report of python -m runtime.benchmark --json (missing or malformed: {error})"
        ) from error
    return report


def _touch_all(report: Mapping[str, Any]) -> None:
    """Read everything that a comparison reads."""
    receipt = report["receipt"]
    _ = float(receipt["multiply_gflops"]), receipt["date"], receipt["machine"]["processor"]
    _ = receipt["machine"]["fingerprint"]
    for row in report["rows"]:
        _ = _case(row), row["package"], float(row["memory_gb_per_s"])
        if not all(value > 0 for values in _run_figures(row["raw"]).values() for value in values):
            raise ValueError("a time is not above 0")


def check_report(
    report: Mapping[str, Any], path: Path, cases: Iterable[tuple[str, Case]], *, other_machine: bool
) -> None:
    """Refuse a report that what will be run cannot be compared with.

    Args:
        report, path: what was read, and where.
        cases: name of the package and case, of each row that will be measured; none if they are not known yet.
        other_machine: accept other hardware than this.
    Raises:
        RequestError: it is of other hardware, or holds none of these cases, or several packages that may be meant.
    """
    theirs, here = report["receipt"]["machine"], Machine.here()
    if theirs["fingerprint"] != here.fingerprint and not other_machine:
        raise RequestError(
            f"--baseline {path}: was measured on another machine ({theirs['processor']}, fingerprint "
            f"{theirs['fingerprint']}; this one has {here.fingerprint}); measure the baseline here, or accept "
            "wide limits with --other-machine"
        )
    wanted = list(cases)
    if wanted and not any(_row_of_report(report, name, case) for name, case in wanted):
        raise RequestError(
            f"--baseline {path}: holds none of the cases that would be run, expected the same --prompt-tokens, "
            "--new-tokens, --batch and --threads"
        )


def _row_of_report(report: Mapping[str, Any], package: str, case: Case) -> Mapping[str, Any] | None:
    """The report's row of a case: of the package of this name, or of the only one."""
    found = [old for old in report["rows"] if _case(old) == case]
    found = [old for old in found if old["package"] == package] or found
    if len(found) > 1:
        raise RequestError(
            f"the baseline's report holds {', '.join(sorted(old['package'] for old in found))}, none of which is "
            f"{package}; expected one package, or one of the same name"
        )
    return found[0] if found else None


def _case(row: Mapping[str, Any]) -> Case:
    return row["threads"], row["batch"], row["prompt_tokens"], row["new_tokens"]


def _figures_of_both(raw: Raw, baseline: Raw) -> Iterator[tuple[Figure, list[float], list[float]]]:
    base = _run_figures(baseline)
    for figure, values in _run_figures(raw).items():
        if figure in base:
            yield figure, values, base[figure]


def _run_figures(raw: Raw) -> dict[Figure, list[float]]:
    """What is compared, of each run: the time to first token, and the median gap."""
    figures: dict[Figure, list[float]] = {"ttft_ids_ms": list(raw["ttft_ids_ms"])}
    if all(raw["itl_ms"]):
        figures["itl_ms"] = [float(np.median(gaps)) for gaps in raw["itl_ms"]]
    return figures


def _judge(pairs: Sequence[_Pair], ratio: Callable[[_Pair, float], Interval], tolerance: float) -> list[Comparison]:
    confidence = 1 - ERROR_RATE / max(1, len(pairs))
    return [
        Comparison(
            package=pair.row.package,
            baseline=pair.baseline,
            threads=pair.row.threads,
            batch=pair.row.batch,
            prompt_tokens=pair.row.prompt_tokens,
            new_tokens=pair.row.new_tokens,
            figure=pair.figure,
            ratio=ratio(pair, confidence),
            confidence=confidence,
            tolerance=tolerance,
            normalised_by=pair.normalised_by,
        )
        for pair in pairs
    ]
