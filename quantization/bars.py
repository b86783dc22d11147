"""What a package must reach: `kl=0.001,top1=0.97` as a list of bars, and who misses one."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import RequestError, VerificationError

AT_LEAST = ("top1", "top5", "accuracy", "last_token_accuracy")
AT_MOST = ("kl", "perplexity", "bits_per_byte", "perplexity_change")


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure that a package must reach, by its name in the results and in their unit."""

    name: str
    value: float

    def missed_by(self, figure: float) -> bool:
        return figure < self.value if self.name in AT_LEAST else figure > self.value

    def __str__(self) -> str:
        return f"at {'least' if self.name in AT_LEAST else 'most'} {self.value:g}"


def read_bars(text: str, *, measured: Collection[str]) -> list[Bar]:
    """Read a list of bars.

    Args:
        text: NAME=VALUE, separated by commas.
        measured: the names of what will be measured.
    Raises:
        RequestError: a bar is malformed, unknown, given twice, or will not be measured.
    """
    bars: dict[str, Bar] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name not in AT_LEAST + AT_MOST:
            raise RequestError(f"--bar: {name!r} is no bar, expected some of {', '.join(AT_MOST + AT_LEAST)}")
        if name not in measured:
            raise RequestError(
                f"--bar: {name} is not measured by this run, which measures {', '.join(measured)}; kl, top1, top5 and "
                "perplexity_change need --text and --reference"
            )
        if name in bars:
            raise RequestError(f"--bar: {name} is given twice; give it once")
        bars[name] = Bar(name, _number(name, number))
    return list(bars.values())


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"--bar: {name} is {text!r}, expected a number, as in {name}=0.5")
    return value


def misses(bars: Iterable[Bar], figures: Mapping[str, Any]) -> list[str]:
    """Which bars the figures of a package miss, by how much."""
    return [f"{bar.name} {figures[bar.name]:.6g}, expected {bar}" for bar in bars if bar.missed_by(figures[bar.name])]


def check_bars(bars: Sequence[Bar], rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse packages that miss a bar.

    Raises:
        VerificationError: some do; every miss is named.
    """
    missed = [f"{row['package']}: {miss}" for row in rows for miss in misses(bars, row)]
    if missed:
        raise VerificationError("; ".join(missed) + "; convert with another precision, or move the bar")
