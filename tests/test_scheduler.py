"""The loop: a text is its request's alone, whatever runs beside it, before it, and in which slot."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import Generation, Request, SamplingOptions, TextGenerator
from runtime.row import Row
from runtime.scheduler import Scheduler

RUNS = 200
"""Random batchings, orders and restarts, for each precision."""

Bits = dict[tuple[int, int], list[int]]
"""(request, ids so far) -> a checksum of the logits that each choice was made from."""


class Recorder:
    """A logits callback that keeps a checksum of what each token is chosen from: equal ids may hide other bits."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, ...], int] = {}

    def __call__(self, ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        self.seen[tuple(ids)] = zlib.crc32(logits.tobytes())
        return logits


def requests_of_all_kinds() -> list[Request]:
    """Greedy and sampled, short and long, one sample and several, ending early, and past the context."""
    rng = random.Random(5)
    sampled = [
        Request(
            [rng.randrange(256) for _ in range(rng.choice([1, 2, 3, 9, 20, 40]))],
            max_new_tokens=rng.choice([1, 2, 7, 20]),
            num_return_sequences=rng.choice([1, 1, 1, 3]),
            sampling=SamplingOptions(seed=seed, top_k=rng.choice([0, 5, 40])),
        )
        for seed in range(9)
    ]
    greedy = [Request([seed, 7, 9], max_new_tokens=15, sampling=SamplingOptions.greedy()) for seed in range(3)]
    past_the_context = [
        Request(
            [rng.randrange(256) for _ in range(length)],
            max_new_tokens=70,
            min_new_tokens=30,
            sampling=SamplingOptions(seed=length, top_k=0),
            overflow="reencode",
            reencode_stride=stride,
            num_return_sequences=2,
        )
        for length, stride in ((30, None), (90, 11))
    ]
    return [*sampled, *greedy, *past_the_context]


@pytest.fixture(scope="module", params=["tiny_fp32", "tiny_int8"])
def package(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def recorded(requests: Sequence[Request]) -> tuple[list[Request], list[Recorder]]:
    recorders = [Recorder() for _ in requests]
    return [
        replace(request, logits_processor=recorder) for request, recorder in zip(requests, recorders, strict=True)
    ], recorders


def ids_of(result: Generation) -> list[tuple[int, ...]]:
    return [sample.ids for sample in result.samples]


def test_a_text_is_the_same_in_every_batching_order_and_restart(package: Path) -> None:
    generator = TextGenerator.load(package)
    requests, recorders = recorded(requests_of_all_kinds())
    expected = [ids_of(next(generator.generate_many([request], batch_size=1))) for request in requests]
    expected_bits = [recorder.seen for recorder in recorders]
    assert len({str(ids) for ids in expected}) == len(requests), "texts that are alike show nothing"
    rng = random.Random(1)
    for run in range(RUNS):
        if run % 20 == 0:
            generator = TextGenerator.load(package)
        waiting = rng.sample(range(len(requests)), rng.randint(2, 8))
        again, recorders = recorded([requests[number] for number in waiting])
        results = generator.generate_many(again, batch_size=rng.randint(1, 7), ordered=rng.random() < 0.5)
        for result in islice(results, rng.randint(1, len(waiting))):  # and is left alone in the midst
            number = waiting[result.index]
            assert ids_of(result) == expected[number]
            assert recorders[result.index].seen == expected_bits[number]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_samples_of_one_prompt_are_the_same_in_any_number_of_slots(package: Path, batch_size: int) -> None:
    generator = TextGenerator.load(package)
    request = Request("ab", sampling=SamplingOptions(seed=12, top_k=0), num_return_sequences=20)
    together = generator.generate("ab", sampling=request.sampling, num_return_sequences=20)
    (result,) = generator.generate_many([request], batch_size=batch_size)
    assert {sample.finish_reason for sample in together.samples} == {"stop", "length"}
    assert ids_of(result) == ids_of(together)


# Slots


@pytest.fixture(scope="module")
def tiny(tiny_fp32: Path) -> TextGenerator:
    return TextGenerator.load(tiny_fp32)


@pytest.fixture
def step_sizes(tiny: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """(rows, new tokens of each) of every run of the graph."""
    runs: list[tuple[int, int]] = []
    start = tiny.decoder.start

    def watched(*, batch: int, capacity: int, unforeseen: bool = False) -> object:
        decoding = start(batch=batch, capacity=capacity, unforeseen=unforeseen)
        rows_of: Callable[[int, int], object] = decoding._rows

        def rows(first: int, stop: int) -> object:
            bound = rows_of(first, stop)
            run = bound.run  # type: ignore[attr-defined]

            class Watched:
                def run(self, ids: NDArray[np.int64], **options: Any) -> object:
                    runs.append((ids.shape[0], ids.shape[1]))
                    return run(ids, **options)

            return Watched()

        monkeypatch.setattr(decoding, "_rows", rows)
        return decoding

    monkeypatch.setattr(tiny.decoder, "start", watched)
    yield runs


def lasting(n_tokens: int, n_prompt: int = 3) -> Request:
    return Request(list(range(n_prompt)), max_new_tokens=n_tokens, min_new_tokens=n_tokens)


def test_a_step_runs_only_rows_that_are_going(tiny: TextGenerator, step_sizes: list[tuple[int, int]]) -> None:
    list(tiny.generate_many([lasting(2), lasting(5), lasting(3)], batch_size=3))
    assert step_sizes == [(1, 3)] * 3 + [(3, 1), (2, 1), (1, 1), (1, 1)]


def test_a_slot_is_used_again_at_once(tiny: TextGenerator, step_sizes: list[tuple[int, int]]) -> None:
    list(tiny.generate_many([lasting(5), lasting(2), lasting(2), lasting(2)], batch_size=2))
    prefill, step = (1, 3), (2, 1)
    assert step_sizes == [prefill, prefill, step, prefill, step, prefill, step, (1, 1)]


def test_samples_of_one_prompt_run_it_once(tiny: TextGenerator, step_sizes: list[tuple[int, int]]) -> None:
    list(tiny.generate_many([replace(lasting(2, n_prompt=9), num_return_sequences=6)], batch_size=4))
    # the last two samples find no other that still runs: all four of the first have ended together
    assert step_sizes == [(1, 9), (4, 1), (2, 1)]


def test_rows_change_one_token_at_a_time_and_end_once(tiny: TextGenerator) -> None:
    scheduler = Scheduler(tiny.decoder, slots=3)
    jobs = [tiny._job(lasting(n_tokens), index) for index, n_tokens in enumerate((4, 1, 2, 6, 3))]
    waiting = iter([row for job in jobs for row in job.new_rows()])
    ended: list[Row] = []
    tokens = dict.fromkeys(range(len(jobs)), 0)
    for changed in scheduler.run(lambda: next(waiting, None)):
        assert len(changed) == len(set(changed)) <= 3
        for row in changed:
            assert row not in ended
            tokens[row.job.index] += 1
            assert len(row.new_ids) == tokens[row.job.index]
        ended += [row for row in changed if row.ended]
    assert sorted(row.job.index for row in ended) == list(tokens)
    assert list(tokens.values()) == [4, 1, 2, 6, 3]


@pytest.mark.parametrize("grows", [False, True])
def test_a_cache_of_rows_that_nobody_knows_yet_grows_where_it_must(
    tiny: TextGenerator, monkeypatch: pytest.MonkeyPatch, grows: bool
) -> None:
    made = []
    start = tiny.decoder.start

    def watched(**arguments: Any) -> object:
        made.append(start(**arguments))
        return made[-1]

    if grows:
        monkeypatch.setattr("runtime.kv_cache.untouched_memory", lambda _n_items, _dtype: None)
    monkeypatch.setattr(tiny.decoder, "start", watched)
    list(tiny.generate_many([lasting(2), lasting(9)], batch_size=2))
    (decoding,) = made
    assert decoding.cache.capacity == (3 + 9 - 1 if grows else tiny.config.n_ctx)
