"""TextSession: the text that it has and streams, and what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import RequestError, SamplingOptions, TextGenerator, TextSession
from runtime.request import SessionOptions

from .sessions import N_NEW, PROMPT, SEED, begun, next_logits, replayed


@pytest.fixture(scope="module")
def fp32(demo_fp32: Path) -> TextGenerator:
    return TextGenerator.load(demo_fp32)


@pytest.fixture(scope="module")
def babbler(tiny_fp32: Path) -> TextGenerator:
    """Ends a text at one token in a few hundred."""
    return TextGenerator.load(tiny_fp32)


def test_stream_gives_the_text_of_generate_and_keeps_the_tokens(fp32: TextGenerator) -> None:
    streaming, generating = begun(fp32), begun(fp32)
    assert "".join(streaming.stream(max_new_tokens=30)) == generating.generate(max_new_tokens=30).text
    assert streaming.ids == generating.ids
    assert streaming.text == generating.text


CHANGES: dict[str, Callable[[TextSession], object]] = {
    "longer": lambda session: session.append("so"),
    "shorter": lambda session: session.rewind(2),
    "another of the same length": lambda session: (session.rewind(len(session.ids) - 1), session.append([7])),
}


@pytest.mark.parametrize("begun_already", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_stream_whose_session_was_changed_ends(
    fp32: TextGenerator, change: Callable[[TextSession], object], begun_already: bool
) -> None:
    session = begun(fp32)
    stream = session.stream(max_new_tokens=N_NEW)
    if begun_already:
        next(stream)
    change(session)
    ids = session.ids
    with pytest.raises(RequestError, match="the session was changed while a stream of it was read; begin a new stream"):
        next(stream)
    assert session.ids == ids
    session.generate(max_new_tokens=2)


def test_a_stream_that_is_left_keeps_what_was_chosen(fp32: TextGenerator) -> None:
    expected = begun(fp32).generate(max_new_tokens=N_NEW).ids
    session = begun(fp32)
    given = len(session.ids)
    for _ in session.stream(max_new_tokens=N_NEW):
        if len(session.ids) >= given + 9:
            break
    written = session.ids[given:]
    assert written == expected[: len(written)]
    assert (*written, *session.generate(max_new_tokens=N_NEW - len(written)).ids) == expected


def test_ends_and_log_probabilities_are_those_of_the_generator(fp32: TextGenerator) -> None:
    written = begun(fp32).generate(max_new_tokens=N_NEW).ids
    word = fp32.tokenizer.decode(written[5:7])
    asked: list[SessionOptions] = [
        {"stop_strings": word, "top_logprobs": 3},
        {"eos_token_id": [written[9], 0], "top_logprobs": 0},
    ]
    for options in asked:
        expected = fp32.generate(PROMPT, sampling=SEED, max_new_tokens=N_NEW, **options).samples[0]
        session, streaming = begun(fp32), begun(fp32)
        sample = session.generate(max_new_tokens=N_NEW, **options)
        assert (sample.text, sample.ids, sample.finish_reason) == (expected.text, expected.ids, "stop")
        assert sample.logprobs == expected.logprobs != ()
        assert session.ids[-len(sample.ids) :] == sample.ids
        assert "".join(streaming.stream(max_new_tokens=N_NEW, **options)) == expected.text


def test_a_session_that_is_cancelled_keeps_what_was_chosen(fp32: TextGenerator) -> None:
    expected = begun(fp32).generate(max_new_tokens=12)
    session, cancel = begun(fp32), threading.Event()
    given = session.ids
    pieces = []
    for piece in session.stream(max_new_tokens=12, cancel=cancel):
        pieces.append(piece)
        cancel.set()
    written = session.ids[len(given) :]
    assert 0 < len(written) < 12
    assert "".join(pieces) == fp32.tokenizer.decode(written)
    stopped = session.generate(max_new_tokens=4, cancel=cancel)
    assert (stopped.ids, stopped.finish_reason, stopped.stats.new_tokens) == ((), "cancelled", 0)
    assert (*written, *session.generate(max_new_tokens=12 - len(written)).ids) == expected.ids


def test_a_deadline_ends_a_session_as_it_stands(fp32: TextGenerator) -> None:
    session = begun(fp32)
    given = session.ids
    sample = session.generate(max_new_tokens=400, min_new_tokens=400, deadline_ms=60)
    assert sample.finish_reason == "deadline"
    assert session.ids == (*given, *sample.ids)
    assert len(sample.ids) < 400
    assert np.array_equal(next_logits(session), next_logits(replayed(session)))


def test_text_and_room_are_told(fp32: TextGenerator) -> None:
    session = TextSession(fp32)
    assert (session.text, session.ids, session.tokens_left) == ("", (), 512)
    session.append("Once upon")
    session.append(" a time")
    assert session.text == "Once upon a time"
    assert session.tokens_left == 512 - len(session.ids)


def test_a_session_without_tokens_begins_with_end_of_text(fp32: TextGenerator) -> None:
    session = TextSession(fp32, sampling=SEED)
    sample = session.generate(max_new_tokens=5)
    assert sample.ids == fp32.generate("", max_new_tokens=5, sampling=SEED).samples[0].ids
    assert session.ids == (8191, *sample.ids)


def test_a_text_that_the_model_ended_can_be_gone_on_with(babbler: TextGenerator) -> None:
    ended = next(
        session
        for seed in range(200)
        for session in [begun(babbler, "a", sampling=SamplingOptions(seed=seed))]
        if session.generate(max_new_tokens=40).finish_reason == "stop"
    )
    assert babbler.config.eos_token_id not in ended.ids
    again = ended.generate(max_new_tokens=5)
    assert (again.finish_reason, again.ids) == ("stop", ())  # the same token as before comes next
    assert "".join(ended.stream(max_new_tokens=5)) == ""
    before = len(ended.ids)
    ended.append("b")
    assert np.array_equal(next_logits(ended), next_logits(replayed(ended)))
    assert len(ended.generate(max_new_tokens=3, min_new_tokens=3).ids) == 3
    assert len(ended.ids) == before + 4


def test_a_logits_processor_that_fails_leaves_the_session_as_it_was(fp32: TextGenerator) -> None:
    expected = begun(fp32).generate(max_new_tokens=6).ids
    session = begun(fp32)
    start = len(session.ids)

    def fails(ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(ids) == start + 2:
            raise KeyError("the caller's own")
        return logits

    with pytest.raises(KeyError):
        session.generate(max_new_tokens=6, logits_processor=fails)
    assert session.ids[start:] == expected[:2]
    assert session.generate(max_new_tokens=4).ids == expected[2:]


# Refusals


def test_what_does_not_fit_the_context_is_refused_until_the_session_is_rewound(fp32: TextGenerator) -> None:
    session = begun(fp32, [5] * 510)
    with pytest.raises(RequestError, match=r"3 tokens to append to 510 do not fit .* 512; append at most 2, or rewind"):
        session.append([1, 2, 3])
    with pytest.raises(RequestError, match=r"510 tokens and max_new_tokens 3 do not fit .*; ask for at most 2, or"):
        session.generate(max_new_tokens=3)
    assert len(session.generate(min_new_tokens=2).ids) == 2
    for refused in (lambda: session.append([1]), session.generate, session.stream):
        with pytest.raises(RequestError, match=r"do not fit the model's context of 512; .*rewind"):
            refused()
    session.rewind(500)
    assert len(session.generate(max_new_tokens=12, min_new_tokens=12).ids) == 12


def test_nothing_appended_is_nothing(fp32: TextGenerator) -> None:
    session = begun(fp32)
    before = session.ids
    for nothing in ("", [], np.empty(0, np.int64)):
        session.append(nothing)
    assert session.ids == before


@pytest.mark.parametrize("ids", [[8192], [-1], [1.5], [[1]], [[1], [1, 2]]])
def test_ids_that_are_none_are_refused_and_change_nothing(fp32: TextGenerator, ids: Any) -> None:
    session = begun(fp32)
    before = session.ids
    with pytest.raises(RequestError, match="token id"):
        session.append(ids)
    assert session.ids == before


@pytest.mark.parametrize("tokens", [-1, 4, 1.0, True])
def test_a_rewind_to_what_there_is_not_is_refused(fp32: TextGenerator, tokens: Any) -> None:
    session = begun(fp32, [1, 2, 3])
    with pytest.raises(RequestError, match=r"cannot rewind to .* tokens, expected 0 to 3"):
        session.rewind(tokens)


@pytest.mark.parametrize("sample", [-1, 1 << 64, 0.5, True])
def test_a_sample_out_of_range_is_refused(fp32: TextGenerator, sample: Any) -> None:
    with pytest.raises(RequestError, match=r"sample is .*, expected a whole number from 0 to 2\*\*64 - 1"):
        TextSession(fp32, sample=sample)
    with pytest.raises(RequestError, match="sample is"):
        TextSession(fp32).fork(sample=sample)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number above 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens is 4, expected 0 to max_new_tokens, 3"),
        ({"max_new_tokens": 512}, "ask for at most 511"),
    ],
)
def test_options_out_of_range_are_refused_when_asked_for(
    fp32: TextGenerator, options: dict[str, Any], message: str
) -> None:
    session = TextSession(fp32)
    for method in (session.generate, session.stream):
        with pytest.raises(RequestError, match=message):
            method(**options)
    assert session.ids == ()


def test_what_is_asked_of_requests_alone_is_refused(fp32: TextGenerator) -> None:
    session = begun(fp32)
    for method in (session.generate, session.stream):
        with pytest.raises(
            RequestError, match="a session is asked for no num_beams, overflow; expected some of max_new"
        ):
            method(num_beams=2, overflow="reencode")  # type: ignore[call-arg]
