"""The comparison with other engines: what its figures mean, that the README says what files say, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.comparison.engines import ENGINES
from benchmarks.comparison.report import (
    BEGIN,
    END,
    Agreement,
    Case,
    agreements,
    figures,
    ratios,
    read_results,
    render_result,
    render_section,
    replace_section,
    result_name,
    summarise,
    write_result,
)
from benchmarks.comparison.spread import Spread
from runtime.errors import RequestError

from .conftest import DEMO_CHECKPOINT

Capture = pytest.CaptureFixture[str]


def measured(batch: int, ttft_ms: float, decode_ms: float, first_ids: list[list[int]]) -> dict[str, Any]:
    """One case as an engine's script reports it."""
    figures = {"ttft_ms": ttft_ms, "decode_ms": decode_ms, "peak_rss_gb": 1.0, "first_ids": first_ids}
    return {"prompt_tokens": 128, "batch": batch, **figures}


def result_of(times: dict[str, list[tuple[float, float]]], rounds: int = 3, **changes: Any) -> dict[str, Any]:
    """A result whose engines took (first token, decode) ms in each round: one row of ids, the last engine's other."""
    odd = list(times)[-1]
    reports = [
        {
            name: {"load_s": 0.5, "cases": [measured(1, *of_rounds[number], [[8 if name == odd else 7, 7]])]}
            for name, of_rounds in times.items()
        }
        for number in range(len(next(iter(times.values()))))
    ]
    engines = {
        name: {
            "software": ENGINES[name].software.name,
            "type": ENGINES[name].type,
            "bits": ENGINES[name].bits,
            "batches": ENGINES[name].software.batches,
            "versions": {"package": "1.2"},
        }
        for name in times
    }
    return {
        "checkpoint": "124M",
        "note": "random weights",
        "date": "2026-01-02",
        "commit": "abc",
        "machine": {"processor": "CPU", "cores": 2, "memory_gb": 8.0, "kernel": "6.1"},
        "load_average": {"start": [0.1, 0.2, 0.3], "end": [1.1, 1.2, 1.3]},
        "options": {"threads": 2, "new_tokens": 32, "rounds": rounds, "runs": 1},
        "method": "As it was done.",
        "engines": engines,
        "rounds": reports,
        **changes,
    }


# Facts


def test_a_spread_is_the_median_the_least_and_the_most() -> None:
    assert Spread.of([3.0, 1.0, 2.5, 9.0]) == Spread(2.75, 1.0, 9.0)
    assert Spread.of([3.0, 1.0, 2.5, 9.0]).text(1) == "2.8 (1.0-9.0)"


def test_a_ratio_is_the_median_of_the_rounds_ratios_not_the_ratio_of_medians() -> None:
    ours, theirs = [(10.0, 1.0), (40.0, 1.0), (30.0, 1.0)], [(20.0, 4.0), (20.0, 2.0), (60.0, 1.0)]
    (ratio,) = ratios(result_of({"gpt2-edge-int8": ours, "llama.cpp-Q8_0": theirs}))
    assert (ratio.ours, ratio.theirs, ratio.case) == ("gpt2-edge-int8", "llama.cpp-Q8_0", Case(1, 128))
    assert ratio.ttft == Spread(0.5, 0.5, 2.0)  # medians 30 and 20 would say 1.5
    assert ratio.decode == Spread(0.5, 0.25, 1.0)


def test_ours_is_held_against_as_many_bits_and_against_the_reference() -> None:
    result = result_of({name: [(1.0, 1.0)] for name in ENGINES})
    of_8_bits = {"openvino-genai-int8", "llama.cpp-Q8_0", "ctranslate2-int8", "optimum-int8", "transformers-fp32"}
    peers_of = {
        "gpt2-edge-int8": of_8_bits,
        "gpt2-edge-int8-kv8": of_8_bits,
        "gpt2-edge-int4": {"openvino-genai-int4", "llama.cpp-Q4_0", "transformers-fp32"},
        "gpt2-edge-fp32": {"optimum-fp32", "transformers-fp32"},
    }
    assert {(ratio.ours, ratio.theirs) for ratio in ratios(result)} == {
        (ours, theirs) for ours, peers in peers_of.items() for theirs in peers
    }


def test_tokens_per_second_are_of_all_rows_together() -> None:
    result = result_of({"ctranslate2-int8": [(1.0, 1.0)]})
    result["rounds"][0]["ctranslate2-int8"]["cases"] = [measured(8, 100.0, 20.0, [[7]] * 8)]
    (row,) = figures(result)
    assert (row.case, row.tokens_per_s.median) == (Case(8, 128), 400.0)


def test_a_case_that_only_one_of_two_ran_has_no_ratio() -> None:
    result = result_of({"gpt2-edge-int8": [(1.0, 1.0)], "llama.cpp-Q8_0": [(1.0, 1.0)]})
    result["rounds"][0]["gpt2-edge-int8"]["cases"].append(measured(8, 1.0, 1.0, [[7]] * 8))
    assert [ratio.case for ratio in ratios(result)] == [Case(1, 128)]


def test_rows_that_begin_otherwise_than_the_reference_are_counted() -> None:
    times = [(1.0, 1.0), (1.0, 1.0)]
    names = ("gpt2-edge-int8", "transformers-fp32", "optimum-fp32")
    found = agreements(result_of(dict.fromkeys(names, times)))
    assert list(found) == [Agreement(names[0], 2, 2), Agreement(names[1], 2, 2), Agreement(names[2], 0, 2)]
    assert not list(agreements(result_of({"optimum-fp32": times})))


def test_a_page_says_how_many_rounds_there_are() -> None:
    times = {"gpt2-edge-int8": [(10.0, 5.0), (12.0, 4.0)], "llama.cpp-Q8_0": [(20.0, 5.0), (20.0, 5.0)]}
    page = render_result(result_of(times, rounds=5))
    assert "rounds 2 of 5," in page
    assert "random weights; 2026-01-02, gpt2-edge at abc; CPU, 2 cores, 8 GB, Linux 6.1; threads 2" in page
    assert "| gpt2-edge-int8 | 11 (10-12) | 4.5 (4.0-5.0) |" in page
    assert "| int8 / llama.cpp (package 1.2) Q8_0 | 0.55 (0.50-0.60) | 0.90 (0.80-1.00) |" in page
    assert "As it was done." in page
    assert "rounds 2, runs of" in render_result(result_of(times, rounds=2))


def test_the_section_tells_the_latest_of_each_checkpoint() -> None:
    times = {"gpt2-edge-int8": [(1.0, 1.0)]}
    results = [
        result_of(times, date="2026-02-01"),
        result_of(times, date="2026-01-01"),
        result_of(times, checkpoint="774M"),
    ]
    section = render_section(results)
    assert "(benchmarks/results/2026-02-01-peers-124M.md)" in section
    assert "(benchmarks/results/2026-01-02-peers-774M.md)" in section
    assert "2026-01-01" not in section


def test_no_files_are_told_as_such() -> None:
    assert render_section([]) == "No comparison has been measured with this version yet.\n"


def test_prompts_are_the_same_for_all_and_none_begins_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(peers.__file__).parent / "engines")
    from measure import prompt_ids  # type: ignore[import-not-found]

    short, long = prompt_ids(8, 2, 1, 50), prompt_ids(16, 2, 1, 50)
    np.testing.assert_array_equal(short, prompt_ids(8, 2, 1, 50))
    assert short.max() < 49  # the last id ends a text
    prompts = [*short, *long, *prompt_ids(8, 1, 1, 50), *prompt_ids(8, 2, 2, 50)]
    assert len({tuple(prompt[:8]) for prompt in prompts}) == len(prompts)


# Laws


@pytest.mark.parametrize("engines", range(2, 10))
def test_every_round_has_all_engines_and_none_always_has_the_same_one_before_it(engines: int) -> None:
    names = list("abcdefghi"[:engines])
    for rounds in range(2, 12):
        before: dict[str, set[str | None]] = {name: set() for name in names}
        for number in range(rounds):
            order = peers.order_of_round(names, number)
            assert sorted(order) == names
            for previous, name in zip([None, *order], order, strict=False):
                before[name].add(previous)
        assert min(map(len, before.values())) > 1


def test_replacing_the_section_touches_nothing_else_and_twice_is_once() -> None:
    readme = f"before\n\n{BEGIN}\nold\n\n{END}\nafter\n"
    once = replace_section(readme, "new\n")
    assert once == f"before\n\n{BEGIN}\nnew\n\n{END}\nafter\n"
    assert replace_section(once, "new\n") == once


def test_a_result_that_is_written_is_read_again(tmp_path: Path) -> None:
    result = result_of({"gpt2-edge-int8": [(10.0, 5.0)], "llama.cpp-Q8_0": [(20.0, 5.0)]})
    write_result(result, tmp_path)
    assert read_results(tmp_path) == [{**result, "summary": json.loads(json.dumps(summarise(result)))}]
    assert {path.name for path in tmp_path.iterdir()} == {f"{result_name(result)}{end}" for end in (".json", ".md")}


# What is committed


def test_the_readme_says_what_the_files_say() -> None:
    readme = peers.README.read_text(encoding="utf-8")
    assert replace_section(readme, render_section(read_results(peers.RESULTS))) == readme, (
        "scripts/bench peers --readme"
    )


@pytest.mark.parametrize("result", read_results(peers.RESULTS), ids=result_name)
def test_a_committed_page_says_what_its_file_says(result: dict[str, Any]) -> None:
    assert (peers.RESULTS / f"{result_name(result)}.md").read_text(encoding="utf-8") == render_result(result)
    assert (peers.RESULTS / f"{result_name(result)}.json").exists()
    assert result["summary"] == json.loads(json.dumps(summarise(result)))


# The real path, with the one engine that needs no environment


def test_two_rounds_of_our_own_engine(tiny_checkpoint: Path, tmp_path: Path, capfd: Capture) -> None:
    words = "--engines gpt2-edge-fp32 --rounds 2 --runs 2 --prompt-tokens 8,16 --batch 1,3 --new-tokens 4 --json"
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    assert peers.main([str(tiny_checkpoint), *words.split(), *folders]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    (written,) = read_results(tmp_path / "results")
    assert written == result
    assert "round 2 of 2: gpt2-edge-fp32, 1 of 1" in err
    assert [row.case for row in figures(result)] == [Case(1, 8), Case(1, 16), Case(3, 8)]
    first, second = (one["gpt2-edge-fp32"]["cases"] for one in result["rounds"])
    assert [case["first_ids"] for case in first] == [case["first_ids"] for case in second]
    assert [len(case["first_ids"]) for case in first] == [1, 1, 3]

    assert peers.main([str(tiny_checkpoint), *words.split(), *folders]) == 2  # half an hour's figures are not replaced
    assert "exists: move it away" in capfd.readouterr().err


# Refusals


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--engines", "gpt2-edge-int8,vllm"], "no engine vllm, expected some of gpt2-edge-int8, "),
        (["--rounds", "0"], "'0', expected a whole number, 1 or more"),
        (["--prompt-tokens", "128,x"], "'x', expected a whole number, 1 or more"),
        (["--new-tokens", "1"], "'1', expected a whole number, 2 or more"),
        (["--readme"], "name either a checkpoint or --readme"),
    ],
)
def test_a_bad_option_is_one_line(words: list[str], told: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        peers.main([str(DEMO_CHECKPOINT), *words])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prompt-tokens", "100,500"], "a prompt of 500 and 32 new tokens do not fit the context of 512"),
        (
            ["--prompt-tokens", "8", "--batch", "8", "--engines", "gpt2-edge-int8,llama.cpp-Q8_0"],
            "llama.cpp-Q8_0: run one row",
        ),
    ],
)
def test_what_an_engine_could_not_run_is_refused_first(words: list[str], told: str, capsys: Capture) -> None:
    assert peers.main([str(DEMO_CHECKPOINT), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_folder_that_lacks_files_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "model.safetensors").touch()
    assert peers.main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no config.json, vocab.json, merges.txt" in line


@pytest.mark.parametrize("readme", ["none", BEGIN, END, END + BEGIN, BEGIN + END + END, BEGIN + BEGIN + END])
def test_a_readme_without_its_markers_is_refused(readme: str) -> None:
    with pytest.raises(RequestError, match=r"README\.md: expected one line"):
        replace_section(readme, "new\n")
