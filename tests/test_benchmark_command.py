"""python -m runtime.benchmark: real packages, every form of output, every gate, and what is refused before any work."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runtime.benchmark.command import main

QUICK = ("--prompt-tokens", "5", "--new-tokens", "4", "--runs", "2", "--load-runs", "0", "--threads", "1")

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's way to refuse
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def report(capsys: Capture, *arguments: object) -> dict[str, Any]:
    status, out, err = run(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    result: dict[str, Any] = json.loads(out)
    return result


def refused(capsys: Capture, *arguments: object) -> str:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    return err


def test_a_sweep_has_a_row_for_each_case_and_package(tiny_fp32: Path, tiny_int8: Path, capsys: Capture) -> None:
    sweep = ("--prompt-tokens", "5,9", "--batch", "1,3", "--new-tokens", "4", "--threads", "1,2", "--runs", "2")
    result = report(capsys, tiny_fp32, tiny_int8, *sweep)
    cases = [
        (row["package"], row["precision"], row["threads"], row["batch"], row["prompt_tokens"]) for row in result["rows"]
    ]
    assert sorted(cases) == sorted(
        (f"tiny-{precision}", precision, threads, batch, length)
        for precision in ("fp32", "int8")
        for threads in (1, 2)
        for batch in (1, 3)
        for length in (5, 9)
    )
    row = result["rows"][0]
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2el_ms"):
        assert set(row[name]) >= {"mean", "p50", "p90", "p95", "p99", "max"}
    assert row["itl_ms"]["n"] == 2 * 3
    assert row["raw"]["load"] == [0, 1]
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_bytes", "load_ms", "share_of_achievable"):
        assert row[name] > 0
    receipt = result["receipt"]
    assert receipt["runs"] == 2
    assert set(receipt["sessions"]) == {"tiny-fp32", "tiny-int8"}
    for session in receipt["sessions"].values():
        assert (session["asked_for"], session["providers"]) == ("cpu", ["CPUExecutionProvider"])
    assert receipt["machine"]["fingerprint"]
    assert not receipt["prepacked"]


def test_loads_from_prepacked_weights_are_timed(tiny_int8: Path, tmp_path: Path, capsys: Capture) -> None:
    result = report(capsys, tiny_int8, *QUICK, "--load-runs", "1", "--prepacked-dir", tmp_path)
    assert result["receipt"]["prepacked"]
    assert result["rows"][0]["load_ms"] > 0
    assert len(list(tmp_path.iterdir())) == 1


def test_people_get_a_table_and_files(tiny_int8: Path, tmp_path: Path, capsys: Capture) -> None:
    files = [tmp_path / name for name in ("rows.csv", "rows.md", "rows.svg")]
    arguments = [
        word for flag, path in zip(("--csv", "--markdown", "--plot"), files, strict=True) for word in (flag, path)
    ]
    status, out, err = run(capsys, tiny_int8, *QUICK, "--batch", "1,2", *arguments)
    assert (status, err) == (0, "")
    assert out.splitlines()[0].split()[:3] == ["package", "threads", "batch"]
    assert "CPUExecutionProvider" in out
    with files[0].open(newline="") as file:
        assert [row["batch"] for row in csv.DictReader(file)] == ["1", "2"]
    assert files[1].read_text().startswith("| package |")
    assert "Throughput of a batch" in files[2].read_text()


def test_a_png_is_drawn_where_one_token_is_written(tiny_int8: Path, tmp_path: Path, capsys: Capture) -> None:
    status, _, err = run(capsys, tiny_int8, *QUICK, "--new-tokens", "1", "--plot", tmp_path / "x.png")
    assert (status, err) == (0, "")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_lengths_that_were_not_run_are_predicted(demo_int8: Path, capsys: Capture) -> None:
    sweep = ("--prompt-tokens", "20,60", "--new-tokens", "8", "--runs", "3", "--load-runs", "0", "--predict", "100,400")
    result = report(capsys, demo_int8, *sweep)
    near, far = result["predictions"]
    assert (near["past_tokens"], far["past_tokens"]) == (100, 400)
    assert near["low"] <= near["itl_ms"] <= near["high"]
    assert any(warning.startswith("far") for warning in far["warnings"])


def test_given_prompts_are_run(demo_int8: Path, tmp_path: Path, capsys: Capture) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\n\nDear Sir\n", encoding="utf-8")
    result = report(capsys, demo_int8, "--prompts", prompts, "--new-tokens", 3, "--runs", 2, "--load-runs", 0)
    assert 1 <= result["rows"][0]["prompt_tokens"] <= 6


def test_a_limit_that_is_missed_is_status_3_behind_the_table(tiny_int8: Path, capsys: Capture) -> None:
    status, out, err = run(capsys, tiny_int8, *QUICK, "--slo", "itl_p50_ms=0.000001,ttft_max_ms=1e9")
    assert status == 3
    assert out.startswith("package")
    assert err.count("\n") == 1
    assert "itl_p50_ms is" in err
    assert "ttft_max_ms" not in err


def test_limits_that_are_kept_are_status_0(tiny_int8: Path, capsys: Capture) -> None:
    result = report(capsys, tiny_int8, *QUICK, "--slo", "e2el_max_ms=1e9")
    assert [limit["kept"] for limit in result["limits"]] == [True]


def test_a_package_runs_beside_its_baseline(tiny_int8: Path, tiny_fp32: Path, capsys: Capture) -> None:
    arguments = (*QUICK, "--runs", 16, "--baseline", tiny_fp32, "--tolerance", 0.99)  # any speed will do
    result = report(capsys, tiny_int8, *arguments)
    assert [each["figure"] for each in result["comparisons"]] == ["ttft_ids_ms", "itl_ms"]
    assert [row["precision"] for row in result["baseline_rows"]] == ["fp32"]
    assert result["receipt"]["loads"] == 16


def test_a_report_is_a_baseline_for_the_next(tiny_int8: Path, tmp_path: Path, capsys: Capture) -> None:
    saved = tmp_path / "report.json"
    saved.write_text(json.dumps(report(capsys, tiny_int8, *QUICK, "--runs", 16)))
    arguments = (*QUICK, "--runs", 16, "--baseline", saved, "--tolerance", 0.8)
    result = report(capsys, tiny_int8, *arguments)
    assert {each["figure"] for each in result["comparisons"]} == {"ttft_ids_ms", "itl_ms"}
    assert {each["tolerance"] for each in result["comparisons"]} == {0.9}
    values = json.loads(saved.read_text())
    values["rows"][0]["raw"]["itl_ms"] = [[1e-6] * 3] * 8
    saved.write_text(json.dumps(values))
    status, _, err = run(capsys, tiny_int8, *arguments)
    assert status == 3
    assert "slower" in err


def test_ctrl_c_ends_it_and_its_processes_in_one_line(demo_int8: Path) -> None:
    arguments = [str(demo_int8), "--prompt-tokens", "400", "--runs", "10000", "--load-runs", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime.benchmark", *arguments],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not children.read_text():
        time.sleep(0.05)
    time.sleep(1)  # somewhere in its work
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")
    with pytest.raises(ProcessLookupError):  # nobody of the group is left; multiprocessing's own helper goes last
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_figures_are_explained(capsys: Capture) -> None:
    status, out, _ = run(capsys, "--explain")
    assert status == 0
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "load_cold_ms", "share_of_achievable"):
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", "500"], "prompt 500, 32 new tokens, batch 1 do not fit the model's context of 512"),
        (["--prompt-tokens", "0"], "'0', expected a whole number, 1 or more"),
        (["--prompt-tokens", "8,x"], "'x', expected a whole number, 1 or more"),
        (["--batch", "-1"], "'-1', expected a whole number, 1 or more"),
        (["--runs", "0"], "'0', expected a whole number, 1 or more"),
        (["--threads", "1000"], "threads is 1000, expected a whole number from 1 to 256"),
        (["--device", "cuda"], "was made for cpu"),
        (["--predict", "512"], "--predict 512: demo-int8 has a context of 512 tokens"),
        (["--slo", "speed=1"], "no figure 'speed'"),
        (["--slo", "itl_p50_ms=1", "--new-tokens", "1"], "needs --new-tokens of 2 or more"),
        (["--slo", "load_ms=1", "--load-runs", "0"], "needs --load-runs of 1 or more"),
        (["--baseline", "nowhere"], "--baseline nowhere: no such package or report"),
        (["--baseline", "tests/tiny.py", "--runs", "16"], "is neither a package nor a report"),
        (["--baseline", "tests", "--runs", "16"], "a folder without a manifest is no package"),
        (["--other-machine"], "--other-machine goes with --baseline FILE"),
        (["--tolerance", "2"], "--tolerance 2.0 is no share from 0 to 1"),
        (["--prompts", "nowhere"], "--prompts nowhere: cannot be read"),
        (["--plot", "picture.jpg"], "expected a name that ends in .svg or .png"),
        (["--plot", "nowhere/x.png"], "there is no folder nowhere"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    demo_int8: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    assert message in refused(capsys, demo_int8, *arguments)


def test_no_package_and_no_such_package_are_refused(tmp_path: Path, capsys: Capture) -> None:
    assert "name at least one PACKAGE" in refused(capsys)
    assert "no such folder" in refused(capsys, tmp_path / "nowhere")


def test_a_package_named_twice_is_refused(tiny_int8: Path, capsys: Capture) -> None:
    assert "a package is named twice" in refused(capsys, tiny_int8, tiny_int8)


def test_few_runs_are_no_comparison(tiny_int8: Path, capsys: Capture) -> None:
    message = refused(capsys, tiny_int8, *QUICK, "--baseline", tiny_int8)
    assert "--runs 2: a comparison needs at least 16" in message


@pytest.mark.parametrize(("content", "message"), [(b"\xff\n", "byte 0 is no UTF-8"), (b"\n\n", "holds no prompt")])
def test_prompts_that_are_none_are_refused(
    tiny_int8: Path, tmp_path: Path, capsys: Capture, content: bytes, message: str
) -> None:
    (tmp_path / "prompts").write_bytes(content)
    assert message in refused(capsys, tiny_int8, "--prompts", tmp_path / "prompts")
