"""What each client did with each kind of package, as the tests saw it, and the README's table of it.

A test that goes through says so to the session's `Compatibility`; the last test of a run holds the README against what
was said. `scripts/test tests/conformance --write-readme` writes it anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.comparison.report import replace_section
from runtime.package import Manifest

BEGIN = "<!-- begin: written by scripts/test tests/conformance --write-readme -->\n"
END = "<!-- end: scripts/test tests/conformance --write-readme -->\n"

COLUMNS = ("fp32", "int8", "int4", "int8, keys and values too")
SAME = "same"
TIES = "same but for ties"
"""Of a cell that passed: the ids are those of our runtime on the same file, all of them, or all but where two tokens
are so nearly as probable that the order of a sum decides."""

NOT_ASKED = "not asked"

Cells = Mapping[tuple[str, str, str], str]
"""(client and version, what was asked, column) -> `SAME`, `TIES`, another finding, or "refused: " and why."""


@dataclass
class Compatibility:
    """What a session's tests said."""

    cells: dict[tuple[str, str, str], str] = field(default_factory=dict)

    def tell(self, client: str, asked: str, column: str, what: str = SAME) -> None:
        assert column in COLUMNS, column
        self.cells[client, asked, column] = what


def column_of(manifest: Manifest) -> str:
    """The table's column for a package."""
    return manifest.precision + (", keys and values too" if manifest.kv_cache == "int8" else "")


def render(cells: Cells) -> str:
    """The README's section: clients in the order of their names, requests in the order in which they were made."""
    rows = dict.fromkeys((client, asked) for client, asked, _ in cells)
    lines = [
        [client, asked, *(cells.get((client, asked, column), NOT_ASKED) for column in COLUMNS)]
        for client, asked in sorted(rows, key=lambda row: row[0])
    ]
    table = [["client", "asked", *COLUMNS], ["---"] * (len(COLUMNS) + 2), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table) + "\n"


def parse(readme: str) -> dict[tuple[str, str, str], str]:
    """The cells of the table that a README has."""
    table = readme.partition(BEGIN)[2].partition(END)[0]
    lines = [line.strip().strip("|").strip() for line in table.splitlines() if line.startswith("|")]
    rows = [re.split(r"\s*\|\s*", line) for line in lines[2:]]
    return {
        (client, asked, column): cell
        for client, asked, *row in rows
        for column, cell in zip(COLUMNS, row, strict=True)
        if cell != NOT_ASKED
    }


def rewritten(readme: str, cells: Cells) -> str:
    """The README with this table."""
    return replace_section(readme, render(cells), BEGIN, END)
