"""The README's table of clients: written and read alike, and saying what this run saw."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runtime.errors import RequestError

from .compatibility import BEGIN, COLUMNS, END, Compatibility, parse, render, rewritten

README = Path(__file__).parents[2] / "README.md"


def cells() -> Compatibility:
    told = Compatibility()
    told.tell("client 2.0", "greedy", "int8")
    told.tell("client 2.0", "greedy", "fp32", "refused: it has no fp32")
    told.tell("another 1.0", "batch", "int4", "same but for ties")
    return told


def test_what_is_written_is_read_again() -> None:
    readme = f"before\n{BEGIN}old\n{END}after\n"
    written = rewritten(readme, cells().cells)
    assert parse(written) == cells().cells
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert rewritten(written, cells().cells) == written


def test_a_row_is_a_client_and_what_it_was_asked() -> None:
    assert render(cells().cells).splitlines()[2:] == [
        "| another 1.0 | batch | not asked | not asked | same but for ties | not asked |",
        "| client 2.0 | greedy | refused: it has no fp32 | same | not asked | not asked |",
    ]


def test_without_its_place_the_table_is_not_written() -> None:
    with pytest.raises(RequestError, match="expected one line"):
        rewritten("no markers", cells().cells)


@pytest.mark.after_the_clients
def test_the_readme_says_what_was_seen(compatibility: Compatibility, request: pytest.FixtureRequest) -> None:
    """Of the clients that ran in this session; rows that nobody saw are told where all of them ran."""
    seen = compatibility.cells
    if request.config.getoption("--write-readme", default=False):
        assert not request.session.testsfailed, "a table is written when all has passed"
        README.write_text(rewritten(README.read_text(encoding="utf-8"), seen), encoding="utf-8")
    told = parse(README.read_text(encoding="utf-8"))
    differ = {cell: (what, told.get(cell)) for cell, what in seen.items() if told.get(cell) != what}
    assert not differ, (
        f"(seen, told) in {README.name}; scripts/test tests/conformance --write-readme writes what was seen"
    )
    without_versions = [{re.sub(r"\d[\w.]*", "", client) for client, _, _ in each} for each in (told, seen)]
    if without_versions[0] == without_versions[1] and not request.config.option.keyword:
        assert set(told) == set(seen)


@pytest.mark.after_the_clients
def test_every_cell_of_the_readme_passed_or_says_why_not() -> None:
    told = parse(README.read_text(encoding="utf-8"))
    asked = {(client, what) for client, what, _ in told}
    assert asked
    assert {(client, what, column) for client, what in asked for column in COLUMNS} == set(told)
