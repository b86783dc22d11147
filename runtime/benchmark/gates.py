"""Limits that rows must keep: --slo ttft_p95_ms=500,itl_p99_ms=60."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RequestError
from .distribution import Distribution
from .report import Row, enough_values

STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")
TIMES = ("ttft", "ttft_ids", "itl", "tpot", "e2el")
AT_MOST = ("load_ms", "load_cold_ms", "peak_rss_bytes", "load_peak_rss_bytes", "disk_bytes")
AT_LEAST = ("prefill_tokens_per_s", "decode_tokens_per_s", "share_of_achievable")


@dataclass(frozen=True, slots=True)
class Limit:
    """A value that every row must keep."""

    name: str
    value: float

    @property
    def needs_decode_steps(self) -> bool:
        return self.name.startswith(("itl", "tpot")) or self.name in ("decode_tokens_per_s", "share_of_achievable")

    @property
    def needs_timed_loads(self) -> bool:
        return self.name in ("load_ms", "load_cold_ms")

    def judge(self, row: Row) -> Judgement:
        """A figure that could not be measured keeps no limit."""
        value = _figure(row, self.name)
        if value is None:
            return Judgement(self, row, None, False)
        return Judgement(self, row, value, value >= self.value if self.name in AT_LEAST else value <= self.value)

    def doubt(self, row: Row) -> str | None:
        """Why the figure is not what its name promises, if so."""
        metric, _, statistic = self.name.removesuffix("_ms").rpartition("_")
        distribution = getattr(row, f"{metric}_ms", None) if metric in TIMES else None
        if isinstance(distribution, Distribution) and not enough_values(statistic, distribution):
            return (
                f"{self.name} is read off {distribution.n} values, which hardly differs from their maximum; see --runs"
            )
        return None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a row's figure is to a limit."""

    limit: Limit
    row: Row
    value: float | None
    kept: bool

    @property
    def figures(self) -> str:
        """What was measured and what was allowed, whatever the row."""
        value = "not to be measured here" if self.value is None else f"{self.value:.4g}"
        return f"{self.limit.name} is {value}, the limit is {self.limit.value:.4g}"

    def __str__(self) -> str:
        return f"{self.row}: {self.figures}"


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
