"""Bars that a package must reach."""

from __future__ import annotations

import pytest

from quantization.bars import Bar, check_bars, read_bars
from runtime.errors import RequestError, VerificationError

MEASURED = ("perplexity", "kl", "top1")


def test_bars_are_read_by_name() -> None:
    assert read_bars("kl=0.001, top1 = 0.97", measured=MEASURED) == [Bar("kl", 0.001), Bar("top1", 0.97)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("foo=1", "'foo' is no bar, expected some of kl, perplexity"),
        ("", "'' is no bar"),
        ("kl=1,", "'' is no bar"),
        ("accuracy=0.5", "accuracy is not measured by this run, which measures perplexity, kl, top1"),
        ("kl=1,kl=2", "kl is given twice"),
        ("kl", "kl is '', expected a number"),
        ("kl=small", "kl is 'small', expected a number"),
        ("kl=nan", "kl is 'nan', expected a number"),
        ("kl=inf", "kl is 'inf', expected a number"),
    ],
)
def test_a_bar_that_means_nothing_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        read_bars(text, measured=MEASURED)


def test_a_figure_on_the_bar_reaches_it() -> None:
    check_bars([Bar("kl", 0.5), Bar("top1", 0.9)], [{"package": "x", "kl": 0.5, "top1": 0.9}])


def test_every_miss_is_named() -> None:
    rows = [{"package": "x", "kl": 0.6, "top1": 0.95}, {"package": "y", "kl": 0.4, "top1": 0.8}]
    with pytest.raises(VerificationError) as raised:
        check_bars([Bar("kl", 0.5), Bar("top1", 0.9)], rows)
    assert str(raised.value) == (
        "x: kl 0.6, expected at most 0.5; y: top1 0.8, expected at least 0.9; convert with another precision, or move "
        "the bar"
    )
