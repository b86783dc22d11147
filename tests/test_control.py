"""Cancelled from another thread, or ended by a deadline: what was written so far is the text's beginning."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.cancel_threads import run_threads
from runtime import Request, RequestError, SamplingOptions, TextGenerator

OPTIONS: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40, "sampling": SamplingOptions(seed=3)}


@pytest.fixture(scope="module")
def tiny(tiny_fp32: Path) -> TextGenerator:
    return TextGenerator.load(tiny_fp32)


@pytest.fixture(scope="module")
def demo(demo_int8: Path) -> TextGenerator:
    return TextGenerator.load(demo_int8)


def after_tokens(count: int, act: Callable[[], object]) -> Callable[..., NDArray[np.float32]]:
    """A logits callback that acts when so many tokens have been written."""
    seen = []

    def processor(ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(len(ids))
        if len(seen) == count:
            act()
        return logits

    return processor


class Countdown:
    """Set from the so-manieth question on."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


# Cancelled


def test_another_thread_ends_a_text(tiny: TextGenerator) -> None:
    whole = tiny.generate("ab", **OPTIONS).samples[0]
    cancel, reached = threading.Event(), threading.Event()

    def wait_until_cancelled() -> None:
        reached.set()
        assert cancel.wait(10)

    def canceller() -> None:
        assert reached.wait(10)
        cancel.set()

    thread = threading.Thread(target=canceller)
    thread.start()
    sample = tiny.generate(
        "ab", **OPTIONS, cancel=cancel, logits_processor=after_tokens(5, wait_until_cancelled)
    ).samples[0]
    thread.join()
    assert (sample.finish_reason, sample.ids) == ("cancelled", whole.ids[:5])
    assert sample.text == tiny.tokenizer.decode(whole.ids[:5])


def test_what_was_cancelled_before_it_began_has_no_text(tiny: TextGenerator) -> None:
    cancel = threading.Event()
    cancel.set()
    samples = tiny.generate("ab", cancel=cancel, num_return_sequences=3).samples
    assert [(sample.text, sample.ids, sample.finish_reason) for sample in samples] == [("", (), "cancelled")] * 3
    stats = samples[0].stats
    assert (stats.new_tokens, stats.ttft_ms, stats.decode_tokens_per_s, stats.itl_ms) == (0, 0.0, 0.0, ())


def test_a_text_that_ended_first_was_not_cancelled(tiny: TextGenerator) -> None:
    cancel = threading.Event()
    processor = after_tokens(40, cancel.set)
    sample = tiny.generate("ab", **OPTIONS, cancel=cancel, logits_processor=processor).samples[0]
    assert (sample.finish_reason, len(sample.ids)) == ("length", 40)


def test_a_stream_that_is_cancelled_gives_the_beginning(tiny: TextGenerator) -> None:
    whole = tiny.generate("ab", **OPTIONS).samples[0]
    cancel = threading.Event()
    streamed = "".join(tiny.stream("ab", **OPTIONS, cancel=cancel, logits_processor=after_tokens(7, cancel.set)))
    assert streamed == tiny.tokenizer.decode(whole.ids[:7])


def test_a_long_prompt_is_left_between_its_pieces(demo: TextGenerator) -> None:
    asked = Countdown(2)  # before the prompt, and behind its first piece
    sample = demo.generate([5] * 500, max_new_tokens=4, cancel=asked).samples[0]
    assert (sample.finish_reason, sample.ids, asked.left) == ("cancelled", (), -1)


def test_others_in_the_batch_go_on(tiny: TextGenerator) -> None:
    cancel = threading.Event()
    requests = [
        Request("ab", **OPTIONS),
        Request("xy", **OPTIONS, cancel=cancel, logits_processor=after_tokens(5, cancel.set)),
        Request("ab", **OPTIONS),
    ]
    results = list(tiny.generate_many(requests, batch_size=2))
    assert [result.samples[0].finish_reason for result in results] == ["length", "cancelled", "length"]
    assert len(results[1].samples[0].ids) == 5
    assert results[0].samples[0].ids == results[2].samples[0].ids == tiny.generate("ab", **OPTIONS).samples[0].ids


# Deadlines


def test_a_deadline_ends_a_text_where_it_is(tiny: TextGenerator) -> None:
    whole = tiny.generate("ab", **OPTIONS).samples[0]
    sample = tiny.generate(
        "ab", **OPTIONS, deadline_ms=1500, logits_processor=after_tokens(6, lambda: time.sleep(1.6))
    ).samples[0]
    assert sample.finish_reason == "deadline"
    assert sample.ids == whole.ids[:6]


def test_a_deadline_that_is_over_at_once_gives_no_text(tiny: TextGenerator) -> None:
    sample = tiny.generate("ab", deadline_ms=1e-9).samples[0]
    assert (sample.finish_reason, sample.text) == ("deadline", "")


def test_a_deadline_far_away_changes_nothing(tiny: TextGenerator) -> None:
    samples = [tiny.generate("ab", **OPTIONS, deadline_ms=ms).samples[0] for ms in (None, 1e9, math.inf)]
    assert len({(sample.ids, sample.finish_reason) for sample in samples}) == 1


@pytest.mark.parametrize("value", [0, -1, math.nan, "5", True])
def test_a_deadline_that_is_no_time_is_refused(tiny: TextGenerator, value: Any) -> None:
    with pytest.raises(RequestError, match=f"deadline_ms is {value!r}, expected a number of milliseconds above 0"):
        tiny.generate("ab", deadline_ms=value)


# Many threads


def test_16_threads_with_random_cancels_and_deadlines_leave_every_text_as_it_is(demo: TextGenerator) -> None:
    report = run_threads(demo, threads=16, seconds=6, seed=0)
    assert report.errors == []
    assert report.wrong == []
    assert report.ended["cancelled"] > 0
    assert report.ended["deadline"] > 0
    assert report.ended["length"] > 20
