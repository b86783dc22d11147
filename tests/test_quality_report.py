"""Tables of quality for a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from quantization.quality_report import COLUMNS, report

COST = {"bytes": 787_654_321, "bits_per_weight": 8.69, "tokens_per_s": 12_345.6, "peak_rss_bytes": None}
TEXT = {"perplexity": 61.58, "standard_error": 1.4, "word_perplexity": 375.9, "bits_per_byte": 1.5, "tokens": 102_200}
NO_COMPARISON = {"kl": None}
CHANGE = {f"p{percent}": percent - 50.5 for percent in (1, 5, 50, 95, 99)}
COMPARISON = {
    "kl": 0.00119,
    "kl_standard_error": 0.00001,
    "top1": 0.97,
    "top5": 1.0,
    "perplexity_change": 0.09,
    "perplexity_change_standard_error": None,
    "probability_change": CHANGE,
}
LAMBADA = {
    "accuracy": 0.3256,
    "accuracy_standard_error": 0.0065,
    "last_token_accuracy": 0.467,
    "perplexity": 40.06,
    "standard_error": 1.48,
    "passages": 5153,
}


def receipt(task: str, dataset: str | None = None) -> dict[str, Any]:
    return {"task": task, "dataset": dataset, "gpt2_edge": "0.1.0"}


def row(package: str, *figures: dict[str, Any], paper: dict[str, float] | None = None) -> dict[str, Any]:
    merged: dict[str, Any] = {"package": package, "paper": paper, **COST}
    for each in figures:
        merged |= each
    return merged


def test_a_row_for_each_package_with_errors_in_parentheses() -> None:
    one, other = report([row("a", TEXT, NO_COMPARISON), row("b", TEXT, NO_COMPARISON)], receipt("text")).splitlines()[
        1:3
    ]
    assert one.split() == ["a", "61.580", "(1.400)", "375.90", "1.5000", "102,200", "787.7", "8.69", "12,346", "-"]
    assert other.startswith("b")


def test_the_reference_heads_the_first_table_and_is_not_held_against_itself() -> None:
    lines = report([row("r", TEXT, COMPARISON), row("b", TEXT, COMPARISON)], receipt("text")).splitlines()
    firsts = [line.split(maxsplit=1)[0] for line in lines if line]
    assert firsts == ["package", "r", "b", "against", "package", "b", "in", "task"]
    assert lines[6].split()[1:6] == ["0.00119", "(0.00001)", "97.00", "100.00", "0.090"]
    assert "(-)" in lines[6]


@pytest.mark.parametrize(
    ("task", "figures"),
    [("text", [TEXT, COMPARISON]), ("lambada", [LAMBADA]), ("cbt", [LAMBADA | {"questions": 2500}])],
)
def test_tables_fit_a_terminal_whatever_a_package_is_called(task: str, figures: list[dict[str, Any]]) -> None:
    paper = {"perplexity": 35.13, "last_token_accuracy": 0.4599}
    rows = [row("packages/" + "long" * 40 + "/774M-int8", *figures, paper=paper), row("b", *figures)]
    lines = report(rows, receipt(task, "lambada") | {"sha256": "0" * 64, "file": "a" * 64}).splitlines()
    assert max(map(len, lines)) <= COLUMNS
    assert any(line.startswith("...") and "/774M-int8 " in line for line in lines)


def test_the_papers_figures_are_shown_where_the_data_set_is_named() -> None:
    paper = {"perplexity": 35.13, "last_token_accuracy": 0.4599}
    text = report([row("a", LAMBADA, paper=paper), row("b", LAMBADA)], receipt("lambada", "lambada"))
    heading, official, other = text.splitlines()[:3]
    assert heading.endswith("paper")
    assert official.endswith("35.13, 45.99%")
    assert other.endswith("  -")
    assert "dataset lambada" in text
    assert "paper" not in report([row("a", LAMBADA)], receipt("lambada"))
