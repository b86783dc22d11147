"""Limits, and comparisons with packages and reports: on rows whose figures are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from runtime import RequestError
from runtime.benchmark.comparison import TOLERANCE, check_report, compare_packages, compare_with_report, read_report
from runtime.benchmark.engine import EngineRun, Loaded, Loads
from runtime.benchmark.gates import parse_limits
from runtime.benchmark.machine import Machine
from runtime.benchmark.report import Row, csv_text, markdown, row_of, table
from runtime.benchmark.timing import RunTimes
from runtime.benchmark.workload import Workload
from runtime.package import Manifest, read_manifest
from runtime.receipt import Receipt

RUNS = 24

RECEIPT = Receipt(
    asked_for="cpu",
    providers=("CPUExecutionProvider",),
    nodes={"CPUExecutionProvider": 121},
    copies=0,
    versions={"onnxruntime": "1.32.0"},
)


@pytest.fixture(scope="module")
def manifest(demo_int8: Path) -> Manifest:
    return read_manifest(demo_int8)


MakeRow = Callable[..., Row]


@pytest.fixture(scope="module")
def make_row(manifest: Manifest) -> MakeRow:
    def make(
        name: str = "demo", *, factor: float = 1.0, gaps: Sequence[float] = (10.0, 12.0), memory: float | None = 20.0
    ) -> Row:
        """A row of RUNS runs whose times differ by up to 2%, `factor` times as long as the usual ones."""
        runs = []
        for number in range(RUNS):
            scale = factor * (1 + 0.02 * (number * 7 % RUNS) / RUNS)
            itl = tuple(gap * scale for gap in gaps)
            times = RunTimes((64,), 101 * scale, 100 * scale, itl, 101 * scale + sum(itl))
            runs.append(EngineRun(times, 1000, load=number % 8))
        return row_of(
            Workload(prompt_tokens=64, new_tokens=len(gaps) + 1, batch=1),
            runs,
            name=name,
            manifest=manifest,
            threads=2,
            loaded=Loaded(900, RECEIPT),
            loads=Loads((50.0, 60.0, 70.0), None, 0.5),
            memory_gb_per_s=memory,
        )

    return make


def receipt(gflops: float = 100.0, **machine: object) -> dict[str, Any]:
    return {
        "date": "2026-11-25T00:00:00+00:00",
        "multiply_gflops": gflops,
        "machine": asdict(Machine.here()) | machine,
    }


def report_file(folder: Path, rows: Sequence[dict[str, Any]], **changes: Any) -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps({"rows": rows, "receipt": receipt(), **changes}))
    return path


# Rows


def test_a_row_follows_from_its_runs(make_row: MakeRow, manifest: Manifest) -> None:
    row = make_row()
    assert row.tpot_ms is not None
    assert row.itl_ms is not None
    assert (row.runs, row.itl_ms.n, row.ttft_ms.n) == (RUNS, 2 * RUNS, RUNS)
    assert row.decode_tokens_per_s == pytest.approx(1e3 / row.tpot_ms.p50)
    assert row.prefill_tokens_per_s == pytest.approx(64 / row.ttft_ids_ms.p50 * 1e3)
    assert row.load_ms == 60
    assert row.bytes_per_step is not None
    assert row.share_of_achievable == pytest.approx(row.bytes_per_step / row.itl_ms.p50 / 1e6 / 20)
    assert row.disk_bytes == sum(entry.bytes for entry in manifest.files.values())


def test_a_load_that_was_not_cold_is_told(make_row: MakeRow) -> None:
    row = make_row()
    assert row.load_cold_ms is None
    assert any("still holds 50% of the files" in warning for warning in row.warnings)


def test_rows_of_one_token_have_no_decode_figures(make_row: MakeRow) -> None:
    row = make_row(gaps=())
    assert (row.itl_ms, row.tpot_ms, row.decode_tokens_per_s, row.share_of_achievable) == (None,) * 4
    assert "-" in table([row]).splitlines()[1].split()


def test_every_form_of_a_report_has_every_row(make_row: MakeRow) -> None:
    rows = [make_row("one"), make_row("two", gaps=())]
    noise = dict.fromkeys(("load_average_before", "load_average_after", "others_share", "stolen_share"), 0.5)
    whole = receipt() | {
        "sessions": {"one": RECEIPT.to_dict()},
        "prepacked": False,
        "narrow_activations": False,
        "versions": {"python": "3.11.7"},
        "noise": noise,
        "runs": 24,
        "loads": 8,
        "warmup": 1,
    }
    assert [line.split()[0] for line in table(rows).splitlines()] == ["package", "one", "two"]
    lines = markdown(rows, whole).splitlines()
    assert [line.count("|") for line in lines[:4]] == [16] * 4
    assert "CPUExecutionProvider, onnxruntime 1.32.0" in lines[-1]
    both = markdown(rows, whole | {"prepacked": True, "narrow_activations": True})
    assert "CPUExecutionProvider, prepacked weights, 7-bit activations, onnx" in both
    header, *values = csv_text(rows).splitlines()
    assert "itl_ms.p99" in header.split(",")
    assert len(values) == 2


# Limits


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("ttft_p95_ms=200", True),
        ("ttft_p95_ms=50", False),
        ("itl_max_ms=20,ttft_ids_mean_ms=150", True),
        ("decode_tokens_per_s=10", True),
        ("decode_tokens_per_s=1000", False),
        ("load_ms=60", True),
        ("peak_rss_bytes=999", False),
        ("load_cold_ms=1e9", False),  # could not be measured
    ],
)
def test_a_limit_is_kept_or_not(make_row: MakeRow, text: str, kept: bool) -> None:
    assert all(limit.judge(make_row()).kept for limit in parse_limits(text)) is kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=5", "no figure 'speed', expected ttft|"),
        ("ttft_p42_ms=5", "no figure 'ttft_p42_ms'"),
        ("itl_p99_ms", "'' is no number above 0, expected as itl_p99_ms=500"),
        ("itl_p99_ms=fast", "'fast' is no number above 0"),
        ("itl_p99_ms=0", "'0' is no number above 0"),
        ("itl_p99_ms=nan", "'nan' is no number above 0"),
        ("", "no figure ''"),
    ],
)
def test_limits_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        parse_limits(text)
    assert message in str(raised.value)


def test_a_percentile_of_few_values_is_doubted(make_row: MakeRow) -> None:
    doubted, sound = parse_limits("ttft_p99_ms=500,ttft_p95_ms=500")
    assert "is read off 24 values" in (doubted.doubt(make_row()) or "")
    assert sound.doubt(make_row()) is None


# Comparisons


def test_a_package_against_itself_is_no_different(make_row: MakeRow) -> None:
    comparisons = compare_packages([make_row()], [make_row()], tolerance=TOLERANCE)
    assert [(each.figure, each.verdict) for each in comparisons] == [
        ("ttft_ids_ms", "no difference"),
        ("itl_ms", "no difference"),
    ]


@pytest.mark.parametrize(("factor", "verdict"), [(1.1, "slower"), (0.9, "faster"), (1.015, "no difference")])
def test_a_tenth_is_a_difference_and_less_than_the_tolerance_is_none(
    make_row: MakeRow, factor: float, verdict: str
) -> None:
    comparisons = compare_packages([make_row(factor=factor)], [make_row()], tolerance=TOLERANCE)
    assert {each.verdict for each in comparisons} == {verdict}
    assert comparisons[0].ratio.value == pytest.approx(factor)
    assert str(comparisons[0]).endswith(verdict)


def test_rows_of_other_cases_are_not_compared(make_row: MakeRow) -> None:
    assert compare_packages([make_row()], [replace(make_row(), threads=1)], tolerance=TOLERANCE) == []


def test_a_report_is_compared_by_what_the_machine_could_do_then(make_row: MakeRow, tmp_path: Path) -> None:
    """Now all is half as fast, and so is the machine."""
    report = read_report(report_file(tmp_path, [asdict(make_row())]))
    now = receipt(gflops=50.0)
    comparisons = compare_with_report([make_row(factor=2, memory=10.0)], now, report, tolerance=TOLERANCE)
    assert [(each.ratio.value, each.verdict) for each in comparisons] == [(pytest.approx(1), "no difference")] * 2
    assert [each.tolerance for each in comparisons] == [pytest.approx(0.12)] * 2
    slower = compare_with_report([make_row(factor=1.3)], receipt(), report, tolerance=TOLERANCE)
    assert {each.verdict for each in slower} == {"slower"}
    elsewhere = receipt(fingerprint="another")
    doubted = compare_with_report([make_row(factor=1.3)], elsewhere, report, tolerance=TOLERANCE)
    assert {(each.verdict, round(each.tolerance, 2)) for each in doubted} == {("no difference", 0.32)}


def test_a_report_of_another_machine_is_refused_unless_asked_for(make_row: MakeRow, tmp_path: Path) -> None:
    path = report_file(tmp_path, [asdict(make_row())], receipt=receipt(fingerprint="another", processor="Abacus"))
    cases = [("demo", make_row().case)]
    with pytest.raises(RequestError, match=r"another machine \(Abacus, fingerprint another.*--other-machine"):
        check_report(read_report(path), path, cases, other_machine=False)
    check_report(read_report(path), path, cases, other_machine=True)


def test_a_report_without_the_case_is_refused(make_row: MakeRow, tmp_path: Path) -> None:
    path = report_file(tmp_path, [asdict(make_row())])
    with pytest.raises(RequestError, match="holds none of the cases that would be run"):
        check_report(read_report(path), path, [("demo", (2, 1, 65, 3))], other_machine=False)


def test_a_report_of_several_packages_must_name_this_one(make_row: MakeRow, tmp_path: Path) -> None:
    path = report_file(tmp_path, [asdict(make_row(name)) for name in ("one", "two")])
    with pytest.raises(RequestError, match="holds one, two, none of which is demo"):
        check_report(read_report(path), path, [("demo", make_row().case)], other_machine=False)
    check_report(read_report(path), path, [("two", make_row().case)], other_machine=False)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"rows": [], "receipt": {}}', '{"rows": [{}], "receipt": {"multiply_gflops": 1}}', "\udcff"],
)
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(RequestError, match=r"is neither a package nor a report|is no report"):
        read_report(path)


def test_times_that_are_none_are_no_report(make_row: MakeRow, tmp_path: Path) -> None:
    row = asdict(make_row())
    row["raw"]["ttft_ids_ms"][3] = 0
    path = report_file(tmp_path, [row])
    with pytest.raises(RequestError, match="a time is not above 0"):
        read_report(path)
