"""Texts longer than the context: refused, cut, or run again from position 0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.checkpoint import read_checkpoint
from export.reference import reference_logits
from runtime import Request, RequestError, SamplingOptions, TextGenerator
from runtime.request import Generation
from runtime.sampling import choose_token, random_uniform

from .conftest import DEMO_CHECKPOINT

N_CTX = 512
LONG = 3000
"""Tokens past the context."""

PROMPT = np.random.default_rng(2).integers(0, 8191, 700)


@pytest.fixture(scope="module")
def fp32(demo_fp32: Path) -> TextGenerator:
    return TextGenerator.load(demo_fp32)


def forbidding_the_end(generator: TextGenerator, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    logits = logits.copy()
    logits[generator.config.eos_token_id] = -np.inf
    return logits


def recomputed(
    generator: TextGenerator, prompt: list[int], n_new: int, sampling: SamplingOptions, *, kept: int
) -> list[int]:
    """The new ids, by a cache that is made anew whenever the last `kept` ids are put at positions 0, 1, 2 ..."""
    ids, start, decoding = list(prompt), 0, None
    for position in range(len(prompt), len(prompt) + n_new):
        overflows = position - start > N_CTX
        if overflows:
            start = position - kept
        if decoding is None or overflows:
            decoding = generator.decoder.start(batch=1, capacity=N_CTX)
            logits = decoding.prefill(0, np.array(ids[start:]))
        else:
            logits = decoding.decode_step(np.array(ids[-1:]))[0]
        uniform = 0.0 if sampling.seed is None else random_uniform(sampling.seed, 0, position)
        ids.append(choose_token(forbidding_the_end(generator, logits), sampling, uniform))
    return ids[len(prompt) :]


def long_request(sampling: SamplingOptions, *, n_prompt: int, stride: int | None) -> Request:
    return Request(
        PROMPT[:n_prompt],
        max_new_tokens=LONG,
        min_new_tokens=LONG,
        sampling=sampling,
        overflow="reencode",
        reencode_stride=stride,
    )


@pytest.fixture(scope="module")
def long_texts(fp32: TextGenerator) -> list[tuple[Request, Generation]]:
    """Two texts of 3,000 tokens past a context of 512, written in one batch."""
    requests = [
        long_request(SamplingOptions.greedy(), n_prompt=600, stride=None),
        long_request(SamplingOptions(seed=4), n_prompt=20, stride=100),
    ]
    return list(zip(requests, fp32.generate_many(requests, batch_size=2), strict=True))


# Again from position 0


def test_3000_tokens_past_the_context_are_those_of_a_recomputed_window(
    fp32: TextGenerator, long_texts: list[tuple[Request, Generation]]
) -> None:
    for (request, result), kept in zip(long_texts, (N_CTX // 2, N_CTX - 100), strict=True):
        assert request.sampling is not None
        expected = recomputed(fp32, list(request.prompt), LONG, request.sampling, kept=kept)  # type: ignore[arg-type]
        assert list(result.samples[0].ids) == expected


def test_a_greedy_token_past_the_context_is_the_oracles(long_texts: list[tuple[Request, Generation]]) -> None:
    _, result = long_texts[0]
    checkpoint = read_checkpoint(DEMO_CHECKPOINT)
    ids, n_prompt, kept = [*result.prompt_ids, *result.samples[0].ids], 600, N_CTX // 2
    for position in (600, 601, 856, 857, 858, 1114, 1115, 3599):  # around re-encodings, each 257 tokens from the last
        start = n_prompt - kept + (position - n_prompt) // (N_CTX - kept + 1) * (N_CTX - kept + 1)
        (logits,) = reference_logits(checkpoint.config, checkpoint.tensors, [np.array(ids[start:position])])
        last = logits[-1].copy()
        last[checkpoint.config.eos_token_id] = -np.inf
        assert last.argmax() == ids[position]


def test_reencodings_are_counted(long_texts: list[tuple[Request, Generation]]) -> None:
    counts = [result.samples[0].stats.reencoded for _, result in long_texts]
    # 600 ids are put at the beginning before the first token, which counts as the prompt's run
    assert counts == [(LONG - 1) // (N_CTX // 2 + 1), 1 + (LONG - 1 - (N_CTX - 20 + 1)) // 101]
    for _, result in long_texts:
        stats = result.samples[0].stats
        assert len(stats.itl_ms) == LONG - 1
        assert min(stats.itl_ms) > 0


def test_a_text_within_the_context_is_as_without(fp32: TextGenerator) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "sampling": SamplingOptions(seed=1)}
    plain, reencoding = (fp32.generate(PROMPT[:50], **options, overflow=mode) for mode in ("error", "reencode"))
    assert reencoding.samples[0].ids == plain.samples[0].ids
    assert reencoding.samples[0].stats.reencoded == 0


def test_the_last_place_of_the_context_is_used_before_the_first_reencoding(fp32: TextGenerator) -> None:
    def reencoded(max_new_tokens: int) -> int:
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens}
        return fp32.generate(PROMPT[:510], **options, overflow="reencode").samples[0].stats.reencoded

    assert [reencoded(tokens) for tokens in (2, 3, 4)] == [0, 0, 1]


def test_a_stream_goes_past_the_context_as_generate_does(fp32: TextGenerator) -> None:
    options: dict[str, Any] = {"max_new_tokens": 90, "sampling": SamplingOptions(seed=8), "overflow": "reencode"}
    streamed = "".join(fp32.stream(PROMPT[:480], **options, reencode_stride=20))
    generated = fp32.generate(PROMPT[:480], **options, reencode_stride=20)
    assert generated.samples[0].stats.reencoded > 1
    assert streamed == generated.text


@pytest.mark.parametrize("stride", [1, 511])
def test_the_least_and_the_largest_stride_write_on(fp32: TextGenerator, stride: int) -> None:
    request = replace(long_request(SamplingOptions.greedy(), n_prompt=512, stride=stride), max_new_tokens=8)
    (result,) = fp32.generate_many([replace(request, min_new_tokens=8)])
    expected = recomputed(fp32, PROMPT[:512].tolist(), 8, SamplingOptions.greedy(), kept=N_CTX - stride)
    assert list(result.samples[0].ids) == expected


# The beginning left out


def test_truncation_leaves_out_as_little_as_it_must(fp32: TextGenerator) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "sampling": SamplingOptions(seed=1)}
    cut = fp32.generate(PROMPT, **options, overflow="truncate")
    assert cut.truncated == len(PROMPT) - (N_CTX - 20)
    assert cut.prompt_ids == tuple(PROMPT[cut.truncated :].tolist())
    assert cut.samples[0].ids == fp32.generate(PROMPT[cut.truncated :], **options).samples[0].ids


def test_a_prompt_that_fits_is_not_truncated(fp32: TextGenerator) -> None:
    result = fp32.generate(PROMPT[:492], max_new_tokens=20, overflow="truncate")
    assert (result.truncated, len(result.prompt_ids)) == (0, 492)


def test_without_a_number_truncation_makes_room_for_the_default(fp32: TextGenerator) -> None:
    result = fp32.generate(PROMPT, sampling=SamplingOptions(seed=0, top_k=5), overflow="truncate")
    assert len(result.prompt_ids) == N_CTX - 128


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overflow": "slide"}, "overflow is 'slide', expected one of error, truncate, reencode"),
        ({"reencode_stride": 5}, "reencode_stride is 5, but overflow is 'error'; leave it out"),
        ({"overflow": "truncate", "reencode_stride": 5}, "but overflow is 'truncate'; leave it out"),
        ({"overflow": "reencode", "reencode_stride": 0}, "reencode_stride is 0, expected a whole number from 1 to 511"),
        ({"overflow": "reencode", "reencode_stride": 512}, "reencode_stride is 512, expected"),
        ({"overflow": "reencode", "reencode_stride": True}, "reencode_stride is True, expected"),
        ({"overflow": "truncate", "max_new_tokens": 512}, "max_new_tokens 512 leaves no place for the prompt"),
        ({"max_new_tokens": 512}, "do not fit the model's context of 512"),
    ],
)
def test_what_cannot_be_done_is_refused(fp32: TextGenerator, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        fp32.generate([1, 2, 3], **options)
