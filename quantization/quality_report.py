"""The figures of packages as tables for a terminal of 120 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
"""The figures of one package, by their names in `--json`."""

COLUMNS = 120
GAP = "  "
SHORTEST_NAME = 12  # of a package, in a table that is too wide

NOTE = "in parentheses: standard errors; bits: a weight's; tokens/s: run while scoring, a prompt's speed, not writing's"

Column = tuple[str, Callable[[Row], str]]
"""A heading, and what stands below it for a package."""


def report(rows: Sequence[Row], receipt: Mapping[str, Any]) -> str:
    """What was measured, and how."""
    quality: list[Column] = {"text": TEXT, "lambada": LAMBADA, "cbt": CHILDRENS_BOOK}[receipt["task"]]
    paper: list[Column] = [("paper", _paper)] if receipt["dataset"] else []
    parts = _table(rows, quality + COST + paper)
    if rows[0].get("kl") is not None:
        heading = f"against {rows[0]['package']}; dp: change of the true token's probability, percentage points"
        parts += ["", textwrap.fill(heading, COLUMNS)]
        parts += _table(rows[1:], AGAINST_REFERENCE)
    known = (f"{name.replace('_', ' ')} {value}" for name, value in receipt.items() if value is not None)
    return "\n".join([*parts, "", NOTE, textwrap.fill(", ".join(known), COLUMNS)])


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """A line for each package, below the headings."""
    table = [[heading for heading, _ in columns], *([of_row(row) for _, of_row in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    room = max(SHORTEST_NAME, COLUMNS - sum(widths) - len(GAP) * len(widths))
    names = [_ending(name, room) for name in ("package", *(row["package"] for row in rows))]
    longest = max(map(len, names))
    return [
        GAP.join([name.ljust(longest), *map(str.rjust, cells, widths)])
        for name, cells in zip(names, table, strict=True)
    ]


def _ending(name: str, room: int) -> str:
    """A name, or its end where there is no room for all of it."""
    return name if len(name) <= room else "..." + name[3 - room :]


def _with_error(name: str, error: str, digits: int, unit: float = 1) -> Callable[[Row], str]:
    """A figure and its standard error in parentheses, both in `unit`s of what was measured."""

    def write(row: Row) -> str:
        by_chance = "-" if row[error] is None else f"{row[error] * unit:.{digits}f}"
        return f"{row[name] * unit:.{digits}f} ({by_chance})"

    return write


def _paper(row: Row) -> str:
    if row["paper"] is None:
        return "-"
    return ", ".join(
        f"{100 * figure:.2f}%" if "accuracy" in metric else f"{figure:.2f}" for metric, figure in row["paper"].items()
    )


def _percentile(name: str) -> Column:
    return f"dp {name}", lambda row: f"{row['probability_change'][name]:+.2f}"


COST: list[Column] = [
    ("MB", lambda row: f"{row['bytes'] / 1e6:,.1f}"),
    ("bits", lambda row: f"{row['bits_per_weight']:.2f}"),
    ("tokens/s", lambda row: f"{row['tokens_per_s']:,.0f}"),
    ("peak MB", lambda row: "-" if row["peak_rss_bytes"] is None else f"{row['peak_rss_bytes'] / 1e6:,.0f}"),
]
TEXT: list[Column] = [
    ("perplexity", _with_error("perplexity", "standard_error", 3)),
    ("a word", lambda row: "-" if row["word_perplexity"] is None else f"{row['word_perplexity']:,.2f}"),
    ("bits/byte", lambda row: f"{row['bits_per_byte']:.4f}"),
    ("tokens", lambda row: f"{row['tokens']:,}"),
]
LAMBADA: list[Column] = [
    ("accuracy %", _with_error("accuracy", "accuracy_standard_error", 2, 100)),
    ("last token %", lambda row: f"{100 * row['last_token_accuracy']:.2f}"),
    ("perplexity", _with_error("perplexity", "standard_error", 2)),
    ("passages", lambda row: f"{row['passages']:,}"),
]
CHILDRENS_BOOK: list[Column] = [
    ("accuracy %", _with_error("accuracy", "accuracy_standard_error", 2, 100)),
    ("questions", lambda row: f"{row['questions']:,}"),
]
AGAINST_REFERENCE: list[Column] = [
    ("KL", _with_error("kl", "kl_standard_error", 5)),
    ("top 1 %", lambda row: f"{100 * row['top1']:.2f}"),
    ("top 5 %", lambda row: f"{100 * row['top5']:.2f}"),
    ("perplexity %", _with_error("perplexity_change", "perplexity_change_standard_error", 3)),
    *(_percentile(name) for name in ("p1", "p5", "p50", "p95", "p99")),
]
