"""generate_many: each request gets what it gets alone, memory is bounded, and no error costs another its text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import Generation, GPT2EdgeError, MachineError, Request, RequestError, SamplingOptions, TextGenerator
from runtime.batch import RESULTS_AHEAD

LENGTHS = (9, 1, 4, 30, 2, 6, 1, 12)


@pytest.fixture(scope="module")
def tiny(tiny_fp32: Path) -> TextGenerator:
    return TextGenerator.load(tiny_fp32)


def lasting(n_tokens: int, seed: int = 0) -> Request:
    """A request whose text has so many tokens."""
    sampling = SamplingOptions(seed=seed, top_k=0)
    return Request("ab", max_new_tokens=n_tokens, min_new_tokens=n_tokens, sampling=sampling)


def lengths(results: Iterable[Generation]) -> list[int]:
    return [result.samples[0].stats.new_tokens for result in results]


class Counted:
    """An endless iterable that tells how much of it was read."""

    def __init__(self, *first: Request) -> None:
        self.n_read = 0
        self._first = first

    def __iter__(self) -> Iterator[Request]:
        for request in (*self._first, *repeat(lasting(1), 1000)):
            self.n_read += 1
            yield request


def ban_all(ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.full_like(logits, -np.inf) if len(ids) > 4 else logits


# Results


@pytest.mark.parametrize("batch_size", [1, 3, 8, 20])
def test_results_come_in_the_order_of_the_requests(tiny: TextGenerator, batch_size: int) -> None:
    requests = [lasting(length, seed) for seed, length in enumerate(LENGTHS)]
    results = list(tiny.generate_many(requests, batch_size=batch_size))
    assert [result.index for result in results] == list(range(len(LENGTHS)))
    assert lengths(results) == list(LENGTHS)


def test_or_each_as_soon_as_it_has_ended(tiny: TextGenerator) -> None:
    results = list(tiny.generate_many(map(lasting, LENGTHS), batch_size=len(LENGTHS), ordered=False))
    assert lengths(results) == sorted(LENGTHS)
    assert [LENGTHS[result.index] for result in results] == sorted(LENGTHS)


def test_a_mere_prompt_is_a_request_with_the_packages_own_options(tiny: TextGenerator) -> None:
    results = list(tiny.generate_many(["ab", [1, 2], np.array([3]), ""]))
    assert [len(result.prompt_ids) for result in results] == [2, 2, 1, 1]
    for result in results:
        sampling = SamplingOptions(seed=result.seed)
        assert tiny.generate(result.prompt_ids, sampling=sampling).samples[0].ids == result.samples[0].ids


def test_a_result_is_what_generate_gives(tiny: TextGenerator) -> None:
    request: dict[str, Any] = {"num_return_sequences": 5, "max_new_tokens": 9, "sampling": SamplingOptions(seed=3)}
    _, result, _ = tiny.generate_many([lasting(3), Request("xy", **request), lasting(3)], batch_size=2)
    alone = tiny.generate("xy", **request)
    assert (result.prompt_ids, result.seed) == (alone.prompt_ids, alone.seed)
    assert [sample.ids for sample in result.samples] == [sample.ids for sample in alone.samples]
    assert [sample.text for sample in result.samples] == [sample.text for sample in alone.samples]


def test_no_requests_give_no_results(tiny: TextGenerator) -> None:
    assert list(tiny.generate_many([])) == []


# Bounds


def test_a_request_is_read_when_a_slot_is_free_for_it(tiny: TextGenerator) -> None:
    requests = Counted()
    results = tiny.generate_many(requests, batch_size=4)
    assert requests.n_read == 0
    next(results)
    assert requests.n_read == 4
    list(islice(results, 40))
    assert requests.n_read <= 4 + 40 + 4


def test_no_more_is_read_while_too_many_results_wait(tiny: TextGenerator) -> None:
    read = []

    def requests() -> Iterator[Request]:
        yield lasting(60)
        for number in count(1):
            read.append(number)
            yield Request([999])

    results = tiny.generate_many(requests(), batch_size=2, on_error="return")
    next(results)
    assert len(read) == 2 * RESULTS_AHEAD
    assert all(result.error is not None for result in islice(results, 1000))


def test_results_that_waited_for_a_long_one_are_all_given(tiny: TextGenerator) -> None:
    results = tiny.generate_many(Counted(lasting(60)), batch_size=2)
    assert [result.index for result in islice(results, 200)] == list(range(200))


# Errors


def test_a_bad_request_is_named_behind_the_results_before_it(tiny: TextGenerator) -> None:
    results = tiny.generate_many([lasting(9), lasting(3), Request([999]), lasting(2)])
    assert lengths(islice(results, 2)) == [9, 3]
    with pytest.raises(RequestError, match="request 2: token id 999 is not in the model"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_an_error_may_be_returned_and_the_others_go_on(tiny: TextGenerator) -> None:
    requests = [lasting(9), Request("a", max_new_tokens=0), Request("\ud800"), lasting(3), None, RequestError("unread")]
    results = list(tiny.generate_many(requests, on_error="return"))  # type: ignore[arg-type]
    assert [result.index for result in results] == list(range(6))
    assert [bool(result.samples) for result in results] == [True, False, False, True, False, False]
    assert [str(result.error).split(",")[0] for result in results] == [
        "None",
        "stopping options: max_new_tokens is 0",
        "text: holds U+D800",
        "None",
        "token ids are no array (object of type 'NoneType' has no len())",
        "unread",
    ]


def test_the_text_of_a_failed_request_is_its_error(tiny: TextGenerator) -> None:
    (result,) = tiny.generate_many([Request([999])], on_error="return")
    with pytest.raises(RequestError, match="token id 999"):
        _ = result.text


def test_a_row_that_fails_alone_leaves_the_others_their_texts(tiny: TextGenerator) -> None:
    requests = [lasting(9, 1), Request("ab", min_new_tokens=10, logits_processor=ban_all), lasting(20, 2)]
    first, failed, last = tiny.generate_many(requests, on_error="return")
    assert isinstance(failed.error, RequestError)
    assert "logits_processor forbids every token" in str(failed.error)
    for result, request in ((first, requests[0]), (last, requests[2])):
        assert result.samples[0].ids == next(tiny.generate_many([request])).samples[0].ids


def test_generate_raises_what_made_a_row_fail(tiny: TextGenerator) -> None:
    with pytest.raises(RequestError, match="logits_processor forbids every token"):
        tiny.generate("ab", min_new_tokens=10, logits_processor=ban_all)
    with pytest.raises(RequestError, match="logits_processor forbids every token"):
        list(tiny.stream("ab", min_new_tokens=10, logits_processor=ban_all))


def test_what_a_callback_raises_ends_all_and_leaves_the_generator_usable(tiny: TextGenerator) -> None:
    def broken(ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        raise ZeroDivisionError("a bug of the application")

    with pytest.raises(ZeroDivisionError):
        list(tiny.generate_many([lasting(9), Request("ab", logits_processor=broken)]))
    assert lengths(tiny.generate_many([lasting(9)])) == [9]


@pytest.mark.parametrize(
    ("requests", "options", "message"),
    [
        ("one prompt", {}, "requests is one str, expected several; put it into a list"),
        (Request("a"), {}, "requests is one Request, expected several; put it into a list"),
        ([], {"batch_size": 0}, "batch_size is 0, expected a whole number above 0"),
        ([], {"batch_size": True}, "batch_size is True, expected"),
        ([], {"on_error": "ignore"}, "on_error is 'ignore', expected one of raise, return"),
    ],
)
def test_what_makes_no_sense_is_refused_at_the_call(
    tiny: TextGenerator, requests: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(GPT2EdgeError, match=message):
        tiny.generate_many(requests, **options)


def test_more_slots_than_memory_holds_are_the_machines_failure(tiny: TextGenerator) -> None:
    with pytest.raises(MachineError, match="no memory for a cache"):
        tiny.generate_many([lasting(1)], batch_size=10**12)
