"""What rounds of figures say, and how it is written down: a result file, its readable twin, the README's section."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.errors import RequestError

from .spread import Spread

OURS = "gpt2-edge"
REFERENCE = "transformers-fp32"
"""What everything of ours is compared with, whatever its precision, and whose ids count as right."""

METHOD = (
    "Rounds alternate: in each, every engine runs in a process of its own, in an order that changes from round to "
    "round. A process loads the model, then runs each case, a short warm-up before it: greedy, ids in and ids out, the "
    "same random ids for every engine and other ids for each run. Several rows are run with the shortest prompt only, "
    "and not by engines that are left out of it here. First token: from the call until every row has one. Decode: the "
    "median time from one step to the next. Figures are medians over the rounds, with the least and the most. A ratio "
    "is our time divided by the peer's in the same round, below 1 where ours is faster; told are the median of these "
    "ratios, the least and the most."
)

BEGIN = "<!-- begin: written by scripts/bench peers --readme -->\n"
END = "<!-- end: scripts/bench peers --readme -->\n"

Result = Mapping[str, Any]
"""The content of a result file; see `benchmarks/peers.py`."""


@dataclass(frozen=True, order=True)
class Case:
    """What is asked of an engine: prompts of so many tokens, so many at once."""

    batch: int
    prompt_tokens: int

    def __str__(self) -> str:
        rows = "" if self.batch == 1 else f", {self.batch} rows"
        return f"prompt {self.prompt_tokens}{rows}"


@dataclass(frozen=True)
class Figures:
    """One engine on one case."""

    engine: str
    case: Case
    ttft_ms: Spread
    decode_ms: Spread
    tokens_per_s: Spread  # while decoding, of all rows together
    peak_rss_gb: Spread  # of the process until then


@dataclass(frozen=True)
class Ratio:
    """Our time divided by the peer's in the same round, on one case."""

    ours: str
    theirs: str
    case: Case
    ttft: Spread
    decode: Spread


@dataclass(frozen=True)
class Agreement:
    """How many rows of ids began as the reference's did."""

    engine: str
    same: int
    rows: int


def summarise(result: Result) -> dict[str, list[dict[str, Any]]]:
    """What the rounds say, ready for JSON."""
    parts: dict[str, Iterable[Figures | Ratio | Agreement]] = {
        "figures": figures(result),
        "ratios": ratios(result),
        "agreement": agreements(result),
    }
    return {name: [asdict(row) for row in rows] for name, rows in parts.items()}


def figures(result: Result) -> Iterator[Figures]:
    """Every engine on every case that it ran."""
    for engine in result["engines"]:
        for case, rows in _over_rounds(result, engine).items():
            yield Figures(
                engine,
                case,
                ttft_ms=Spread.of(row["ttft_ms"] for row in rows),
                decode_ms=Spread.of(row["decode_ms"] for row in rows),
                tokens_per_s=Spread.of(case.batch * 1e3 / row["decode_ms"] for row in rows),
                peak_rss_gb=Spread.of(row["peak_rss_gb"] for row in rows),
            )


def ratios(result: Result) -> Iterator[Ratio]:
    """Ours beside every peer of as many bits, and beside the reference, on every case that both ran."""
    for ours, theirs in _pairs(result["engines"]):
        our_cases, their_cases = _over_rounds(result, ours), _over_rounds(result, theirs)
        for case in (case for case in our_cases if case in their_cases):
            paired = list(zip(our_cases[case], their_cases[case], strict=True))
            yield Ratio(
                ours,
                theirs,
                case,
                ttft=Spread.of(our["ttft_ms"] / their["ttft_ms"] for our, their in paired),
                decode=Spread.of(our["decode_ms"] / their["decode_ms"] for our, their in paired),
            )


def agreements(result: Result) -> Iterator[Agreement]:
    """Every engine's first ids beside the reference's; nothing where the reference did not run."""
    if REFERENCE not in result["engines"]:
        return
    right = _first_ids(result, REFERENCE)
    for engine in result["engines"]:
        ids = _first_ids(result, engine)
        same = [row == right[place] for place, row in ids.items() if place in right]
        yield Agreement(engine, sum(same), len(same))


def _pairs(engines: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for ours, our in engines.items():
        for theirs, their in engines.items():
            comparable = their["bits"] == our["bits"] or theirs == REFERENCE
            if our["software"] == OURS != their["software"] and comparable:
                yield ours, theirs


def _over_rounds(result: Result, engine: str) -> dict[Case, list[Mapping[str, Any]]]:
    """Each case's figures, a list entry for each round."""
    found: dict[Case, list[Mapping[str, Any]]] = {}
    for one in result["rounds"]:
        for row in one[engine]["cases"]:
            found.setdefault(Case(row["batch"], row["prompt_tokens"]), []).append(row)
    return found


def _first_ids(result: Result, engine: str) -> dict[tuple[int, Case, int], list[int]]:
    """(round, case, row) -> ids."""
    return {
        (number, case, row): ids
        for case, rounds in _over_rounds(result, engine).items()
        for number, figures in enumerate(rounds)
        for row, ids in enumerate(figures["first_ids"])
    }


def render_result(result: Result) -> str:
    """A result file as a page of Markdown."""
    parts = [f"# Beside peers: {result['checkpoint']}, {result['date']}", _receipt(result), result["method"]]
    parts += ["## Engines", _engines_table(result)]
    rows = list(figures(result))
    for case in sorted({row.case for row in rows}):
        parts += [f"## {str(case).capitalize()}", _figures_table(row for row in rows if row.case == case)]
    parts += ["## Our time as a share of theirs", _ratios_table(result)]
    return "\n\n".join(parts) + "\n"


def render_section(results: Sequence[Result]) -> str:
    """The README's section: of each checkpoint the latest result."""
    if not results:
        return "No comparison has been measured with this version yet.\n"
    latest = {result["checkpoint"]: result for result in sorted(results, key=lambda result: str(result["date"]))}
    parts = [
        "Our time as a share of the peer's: median of the ratios of the rounds (least-most), below 1 where ours is "
        "faster. Ids in and ids out, greedy. `scripts/bench peers CHECKPOINT` measures and writes the files, which say "
        "how."
    ]
    for _, result in sorted(latest.items()):
        name = result_name(result)
        parts += [f"**{result['checkpoint']}**: {_receipt(result)} [{name}](benchmarks/results/{name}.md)"]
        parts += [_ratios_table(result)]
    return "\n\n".join(parts) + "\n"


def replace_section(readme: str, section: str, begin: str = BEGIN, end: str = END) -> str:
    """The README with the text between the two markers replaced.

    Raises:
        RequestError: the markers are not there, once each and in order.
    """
    before, began, rest = readme.partition(begin)
    _, ended, after = rest.partition(end)
    if not (began and ended) or begin in rest or end in after:
        raise RequestError(
            f"README.md: expected one line {begin.strip()} and after it one {end.strip()}; put them back"
        )
    return f"{before}{begin}\n{section}\n{end}{after}"


def result_name(result: Result) -> str:
    """Of a result's files, less their endings."""
    return f"{result['date']}-peers-{result['checkpoint']}"


def read_results(folder: Path) -> list[Result]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-peers-*.json"))]


def write_result(result: Result, folder: Path) -> None:
    """Write a result with its summary, and the page that tells it; a reader meanwhile sees the old or the new ones."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        ".json": json.dumps({**result, "summary": summarise(result)}, indent=1, allow_nan=False) + "\n",
        ".md": render_result(result),
    }
    for suffix, text in contents.items():
        unfinished = folder / f".{result_name(result)}{suffix}.unfinished"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / f"{result_name(result)}{suffix}")


def _receipt(result: Result) -> str:
    machine, options = result["machine"], result["options"]
    done, wanted = len(result["rounds"]), options["rounds"]
    rounds = f"{done}" if done == wanted else f"{done} of {wanted}"
    load = {when: "/".join(f"{value:.1f}" for value in result["load_average"][when]) for when in ("start", "end")}
    parts = [
        result["note"],
        f"{result['date']}, gpt2-edge at {result['commit']}",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB, Linux {machine['kernel']}",
        f"threads {options['threads']}, new tokens {options['new_tokens']}",
        f"rounds {rounds}, runs of a case in a round {options['runs']}",
        f"load average {load['start']} at the start, {load['end']} at the end",
    ]
    return "; ".join(part for part in parts if part) + "."


def _engines_table(result: Result) -> str:
    agreement = {row.engine: row for row in agreements(result)}
    rows = []
    for name, engine in result["engines"].items():
        load_s = Spread.of(one[name]["load_s"] for one in result["rounds"])
        ids = f"{agreement[name].same} of {agreement[name].rows}" if name in agreement else "not compared"
        batches = "yes" if engine["batches"] else "left out"
        versions = ", ".join(f"{package} {version}" for package, version in engine["versions"].items())
        rows.append([f"{engine['software']} {engine['type']}", versions, load_s.text(1), batches, ids])
    header = ["engine", "versions", "load s", "several rows", f"rows that begin with the ids of {REFERENCE}"]
    return _table(header, rows)


def _figures_table(rows: Iterable[Figures]) -> str:
    header = ["engine", "first token ms", "decode ms a step", "tokens/s, all rows", "peak RSS GB"]
    return _table(
        header,
        [
            [row.engine, row.ttft_ms.text(0), row.decode_ms.text(1), row.tokens_per_s.text(0), row.peak_rss_gb.text(2)]
            for row in rows
        ],
    )


def _ratios_table(result: Result) -> str:
    rows = {(row.ours, row.theirs, row.case): row for row in ratios(result)}
    cases = sorted({case for _, _, case in rows})
    header = ["ours / theirs", *(f"{case}: {what}" for case in cases for what in ("first token", "decode"))]
    lines = []
    for ours, theirs in _pairs(result["engines"]):
        cells = [cell for case in cases for cell in _ratio_cells(rows.get((ours, theirs, case)))]
        lines.append([f"{result['engines'][ours]['type']} / {_label(result['engines'][theirs])}", *cells])
    return _table(header, lines)


def _ratio_cells(row: Ratio | None) -> tuple[str, str]:
    return (row.ttft.text(2), row.decode.text(2)) if row else ("left out", "left out")


def _label(engine: Mapping[str, Any]) -> str:
    package, version = next(iter(engine["versions"].items()))
    of_package = "" if package == engine["software"] else f"{package} "
    return f"{engine['software']} ({of_package}{version}) {engine['type']}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
