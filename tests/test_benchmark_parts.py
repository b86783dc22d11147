"""Workloads, the clock, engines in processes of their own, the page cache, the machine: each part for real."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from numpy.typing import NDArray
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel as ByteLevelSplit

from runtime import GPT2EdgeError, MachineError, RequestError, TextGenerator
from runtime.benchmark.engine import Engine, Placement, time_loads
from runtime.benchmark.machine import Machine, NoiseMeter, peak_rss_bytes, reset_peak_rss
from runtime.benchmark.page_cache import drop_from_page_cache, resident_share
from runtime.benchmark.probes import multiply_gflops, read_gb_per_s
from runtime.benchmark.timing import DEFINITIONS, RunTimes, time_run
from runtime.benchmark.workload import Workload, random_text
from runtime.package import open_package
from runtime.place import Place
from runtime.tokenizer import Tokenizer

MIB = 1 << 20


def slept(seconds: float, _ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
    time.sleep(seconds)
    return logits


@pytest.fixture(scope="module")
def tiny(tiny_fp32: Path) -> TextGenerator:
    return TextGenerator.load(tiny_fp32)


@pytest.fixture(scope="module")
def demo(demo_int8: Path) -> TextGenerator:
    return TextGenerator.load(demo_int8)


# Workloads


@pytest.mark.parametrize("n_tokens", [1, 2, 17, 400])
def test_a_random_text_has_exactly_so_many_tokens(demo: TextGenerator, tiny: TextGenerator, n_tokens: int) -> None:
    for tokenizer in (demo.tokenizer, tiny.tokenizer):  # words; bytes
        assert len(tokenizer.encode(random_text(tokenizer, n_tokens, seed=3))) == n_tokens


def test_every_run_and_row_has_a_text_of_its_own_and_has_it_again(demo: TextGenerator) -> None:
    workload = Workload(prompt_tokens=12, new_tokens=1, batch=3)
    runs = [workload.texts(demo.tokenizer, run) for run in range(2)]
    assert len({text for texts in runs for text in texts}) == 6
    assert workload.texts(demo.tokenizer, 1) == runs[1]


def test_given_prompts_are_taken_in_turn(demo: TextGenerator) -> None:
    workload = Workload(prompts=("a", "b", "c"), new_tokens=1, batch=2)
    assert [workload.texts(demo.tokenizer, run) for run in range(3)] == [["a", "b"], ["c", "a"], ["b", "c"]]


# The clock


def test_times_of_a_run_fit_together(demo: TextGenerator) -> None:
    texts = ["Once upon a time", "Dear Sir"]
    times = time_run(demo, texts, new_tokens=6)
    assert times.prompt_tokens == tuple(len(demo.tokenizer.encode(text)) for text in texts)
    assert len(times.itl_ms) == 5
    assert 0 < times.ttft_ids_ms < times.ttft_ms
    assert min(times.itl_ms) > 0
    assert times.ttft_ids_ms + sum(times.itl_ms) < times.e2el_ms


def test_one_token_has_no_gaps(demo: TextGenerator) -> None:
    assert time_run(demo, ["Dear Sir"], new_tokens=1).itl_ms == ()


def test_what_a_callback_sleeps_is_in_every_gap(demo: TextGenerator) -> None:
    times = time_run(demo, ["Dear Sir"], new_tokens=4, logits_processor=partial(slept, 0.05))
    assert min(times.itl_ms) > 50
    assert times.ttft_ids_ms > 50


def test_text_that_ends_in_half_a_character_has_a_first_text_all_the_same(tiny: TextGenerator) -> None:
    def half(_ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        logits[0xE2] = 1e6  # a byte that others must follow
        return logits

    times = time_run(tiny, ["a"], new_tokens=2, logits_processor=half)
    assert times.ttft_ids_ms < times.ttft_ms <= times.e2el_ms


def test_every_figure_of_a_run_is_defined() -> None:
    for name in set(RunTimes.__dataclass_fields__) - {"prompt_tokens"}:
        assert f"\n{name} " in f"\n{DEFINITIONS}"


# Engines


def test_an_engine_runs_a_workload_in_a_process_of_its_own(demo_int8: Path) -> None:
    with Engine(Placement(package=open_package(demo_int8), threads=2)) as engine:
        run = engine.run(Workload(prompt_tokens=9, new_tokens=3, batch=2), 0)
        assert engine.loaded.receipt.providers == ("CPUExecutionProvider",)
    assert run.times.prompt_tokens == (9, 9)
    assert run.peak_rss_bytes is not None
    assert run.peak_rss_bytes > 7 * MIB


def test_an_engines_error_is_raised_here(demo_int8: Path) -> None:
    with (
        Engine(Placement(package=open_package(demo_int8), threads=1)) as engine,
        pytest.raises(RequestError, match="do not fit the model's context of 512"),
    ):
        engine.run(Workload(prompt_tokens=511, new_tokens=3, batch=1), 0)


def test_a_package_that_does_not_load_says_so_here(demo_int8: Path) -> None:
    with pytest.raises(GPT2EdgeError, match="was made for cpu, asked for cuda"):
        Engine(Placement(package=open_package(demo_int8), place=Place("cuda"), threads=1))


def test_a_killed_engine_is_the_machines_failure(demo_int8: Path) -> None:
    with Engine(Placement(package=open_package(demo_int8), threads=1)) as engine:
        for child in multiprocessing.active_children():
            child.kill()
        with pytest.raises(MachineError, match="ended with status -9"):
            engine.run(Workload(prompt_tokens=9, new_tokens=3, batch=1), 0)


def test_loads_are_timed_warm_and_cold(demo_int8: Path) -> None:
    loads = time_loads(Placement(package=open_package(demo_int8), threads=2), 2)
    assert len(loads.warm_ms) == 2
    assert min(loads.warm_ms) > 0
    # where the page cache keeps what it is told to drop, there is no cold figure
    assert loads.cold_ms is None or loads.cold_resident_share is not None


# The page cache, the machine, what it can do


def test_the_page_cache_holds_what_was_read_and_drops_what_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * 4096))
    path.read_bytes()
    assert resident_share([path]) == 1
    assert drop_from_page_cache([path])
    share = resident_share([path])
    assert share is not None
    assert share < 1


def test_files_without_pages_have_no_share(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert resident_share([tmp_path / "empty"]) is None


def test_a_machine_is_the_same_when_it_is_looked_at_again() -> None:
    machine = Machine.here()
    assert machine == Machine.here()
    assert machine.processors >= 1
    assert len(machine.fingerprint) == 16


def test_own_work_is_no_noise() -> None:
    meter = NoiseMeter()
    before = os.times().user
    while os.times().user < before + 0.3:
        np.sort(np.arange(100_000))
    noise = meter.read()
    assert noise.others_share is not None
    assert 0 <= noise.others_share <= 1


def test_a_peak_is_seen_and_begins_anew() -> None:
    reset_peak_rss()
    low = peak_rss_bytes()
    with mmap.mmap(-1, 64 * MIB) as fresh:  # an array might be given memory that this process already holds
        fresh.write(b"x" * len(fresh))
        high = peak_rss_bytes()
    reset_peak_rss()
    again = peak_rss_bytes()
    assert low is not None
    assert high is not None
    assert again is not None
    assert high - low > 60 * MIB
    assert again < high - 30 * MIB


def test_probes_give_speeds_of_this_world() -> None:
    assert 0.1 < read_gb_per_s(MIB, threads=2) < 10_000
    assert 0.1 < read_gb_per_s(64 * MIB, threads=1, available_bytes=32 * MIB) < 10_000
    assert 0.1 < multiply_gflops() < 1e6


def test_a_vocabulary_without_letters_is_told() -> None:
    backend = tokenizers.Tokenizer(BPE(vocab={"0": 0, "1": 1}, merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevelSplit(add_prefix_space=False), ByteLevel()
    with pytest.raises(RequestError, match=r"no text of exactly 5 tokens.*--prompts FILE"):
        random_text(Tokenizer(backend), 5, seed=0)
