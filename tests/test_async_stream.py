"""Streaming in an event loop: the same text, a loop that stays free, and no work for a reader that has gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import RequestError, SamplingOptions, TextGenerator

OPTIONS: dict[str, Any] = {"max_new_tokens": 60, "min_new_tokens": 60, "sampling": SamplingOptions(seed=3)}


@pytest.fixture(scope="module")
def demo(demo_int8: Path) -> TextGenerator:
    return TextGenerator.load(demo_int8)


class Steps:
    """A logits callback that counts tokens, and at one of them waits."""

    def __init__(self, *, wait_at: int = 0) -> None:
        self.count = 0
        self.waiting, self.go_on = threading.Event(), threading.Event()
        self._wait_at = wait_at

    def __call__(self, ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        self.count += 1
        if self.count == self._wait_at:
            self.waiting.set()
            assert self.go_on.wait(10)
        return logits


def test_the_text_is_that_of_generate(demo: TextGenerator) -> None:
    async def read() -> str:
        return "".join([piece async for piece in demo.stream_async("Once upon", **OPTIONS)])

    assert asyncio.run(read()) == demo.generate("Once upon", **OPTIONS).text


def test_several_readers_get_their_texts_together(demo: TextGenerator) -> None:
    async def read(prompt: str) -> str:
        return "".join([piece async for piece in demo.stream_async(prompt, **OPTIONS)])

    async def read_all() -> list[str]:
        return await asyncio.gather(*map(read, ("Once", "The", "“Yes")))

    assert asyncio.run(read_all()) == [demo.generate(prompt, **OPTIONS).text for prompt in ("Once", "The", "“Yes")]


def test_the_loop_stays_free_while_a_token_is_computed(demo: TextGenerator) -> None:
    steps = Steps(wait_at=3)

    async def read() -> None:
        async for _ in demo.stream_async("Once", **OPTIONS, logits_processor=steps):
            pass

    async def read_and_release() -> None:
        reader = asyncio.create_task(read())
        while not steps.waiting.is_set():  # if the loop were held by the token, nobody would let it go on
            await asyncio.sleep(0.001)
        steps.go_on.set()
        await reader

    asyncio.run(read_and_release())
    assert steps.count == 60


def test_a_reader_that_is_cancelled_ends_the_text_at_the_next_token(demo: TextGenerator) -> None:
    steps = Steps(wait_at=5)

    async def read() -> None:
        async for _ in demo.stream_async("Once", **OPTIONS, logits_processor=steps):
            pass

    async def cancel() -> None:
        reader = asyncio.create_task(read())
        while not steps.waiting.is_set():
            await asyncio.sleep(0.001)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        steps.go_on.set()

    asyncio.run(cancel())  # waits for its threads
    assert steps.count == 5


def test_a_reader_that_leaves_ends_the_text(demo: TextGenerator) -> None:
    steps = Steps()

    async def read_one() -> None:
        stream = demo.stream_async("Once", **OPTIONS, logits_processor=steps)
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(read_one())
    assert 0 < steps.count < 60


def test_the_callers_own_cancellation_holds_too(demo: TextGenerator) -> None:
    cancel = threading.Event()
    cancel.set()

    async def read() -> list[str]:
        return [piece async for piece in demo.stream_async("Once", **OPTIONS, cancel=cancel)]

    assert asyncio.run(read()) == []


def test_a_bad_request_is_refused_at_the_call(demo: TextGenerator) -> None:
    with pytest.raises(RequestError, match="max_new_tokens is 0"):
        demo.stream_async("Once", max_new_tokens=0)


def test_an_error_on_the_way_reaches_the_reader(demo: TextGenerator) -> None:
    def broken(ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        raise ZeroDivisionError("a bug of the application")

    async def read() -> None:
        async for _ in demo.stream_async("Once", logits_processor=broken):
            pass

    with pytest.raises(ZeroDivisionError):
        asyncio.run(read())
