"""TextGenerator: the same text by every way of asking, and every request it cannot honour refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export.checkpoint import read_checkpoint
from export.reference import reference_logits
from runtime import (
    GPT2EdgeError,
    MachineError,
    PackageError,
    RequestError,
    SamplingOptions,
    TextGenerator,
    TokenizerError,
)
from runtime.package import open_package, write_manifest
from runtime.row import DEFAULT_NEW_TOKENS
from runtime.text_generator import open_decoder

from .conftest import BYTES_AND_END, DEMO_CHECKPOINT, bytes_checkpoint, converted

SCORE_FP32 = 5e-5
"""Nats. Measured: 9.5e-6."""

PROMPT = "“I do not know,” said he; “it"
"""Its continuations hold quotation marks and apostrophes, whose three bytes are often tokens of their own."""


@pytest.fixture(scope="module")
def fp32(demo_fp32: Path) -> TextGenerator:
    return TextGenerator.load(demo_fp32)


@pytest.fixture(scope="module")
def int8(demo_int8: Path) -> TextGenerator:
    return TextGenerator.load(demo_int8)


@pytest.fixture(scope="module")
def babbler(tiny_fp32: Path) -> TextGenerator:
    """Ends a text at one token in a few hundred, and speaks in bytes: half of it is no UTF-8."""
    return TextGenerator.load(tiny_fp32)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def generator(request: pytest.FixtureRequest) -> TextGenerator:
    chosen: TextGenerator = request.getfixturevalue(request.param)
    return chosen


def seeded(seed: int) -> SamplingOptions:
    return SamplingOptions(seed=seed)


def unlikely_to_stop(seed: int) -> SamplingOptions:
    return SamplingOptions(seed=seed, top_k=0)


# Loading


def test_a_package_that_was_replaced_while_it_was_opened_is_refused(
    copied: Callable[[Path], Path], tiny_fp32: Path, demo_fp32: Path
) -> None:
    folder = copied(tiny_fp32)
    opened = open_package(folder)
    write_manifest(folder, replace(opened.manifest, source=open_package(demo_fp32).manifest.source))
    with pytest.raises(PackageError, match="was replaced while it was opened; open it again"):
        open_decoder(opened)


# Scores


@pytest.mark.parametrize("n_tokens", [2, 3, 129, 300])
def test_scores_are_the_oracles_log_probabilities(fp32: TextGenerator, n_tokens: int) -> None:
    ids = np.random.default_rng(3).integers(0, 8191, n_tokens)
    checkpoint = read_checkpoint(DEMO_CHECKPOINT)
    (logits,) = reference_logits(checkpoint.config, checkpoint.tensors, [ids])
    logits = logits.astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = log_probabilities[np.arange(n_tokens - 1), ids[1:]]
    assert np.abs(fp32.score(ids) - expected).max() < SCORE_FP32


def test_a_full_context_can_be_scored(fp32: TextGenerator) -> None:
    scores = fp32.score(np.arange(512))
    assert scores.shape == (511,)
    assert scores.dtype == np.float64
    assert (scores < 0).all()


def test_sense_scores_higher_than_nonsense(generator: TextGenerator) -> None:
    sense, nonsense = (
        generator.score(generator.tokenizer.encode(text)).mean()
        for text in ("He said that he would come again in the morning.", "Come said the morning would he in that he.")
    )
    assert sense > nonsense


def test_the_first_token_is_given_so_one_token_has_no_score(fp32: TextGenerator) -> None:
    with pytest.raises(RequestError, match="1 tokens to score, expected at least 2: the first one is given"):
        fp32.score([5])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0] * 513, "513 tokens do not fit the model's context of 512"),
        ([1, 8192], "token id 8192 is not in the model"),
        ([1, -1], "token id -1 is not in the model"),
        ([1.0, 2.0], "dtype float64, expected one row of integers"),
        ([[1, 2], [3, 4]], r"shape \(2, 2\)"),
        ([[1, 2], [3]], "token ids are no array"),
        (["a", "b"], "dtype <U1"),
        ([1, 2**70], "dtype object"),
    ],
)
def test_what_cannot_be_scored_is_refused(fp32: TextGenerator, ids: Sequence[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        fp32.score(ids)


# The same text by every way of asking


@pytest.mark.parametrize("sampling", [SamplingOptions.greedy(), seeded(1), seeded(2), seeded(3)])
def test_stream_gives_the_text_of_generate(generator: TextGenerator, sampling: SamplingOptions) -> None:
    streamed = "".join(generator.stream(PROMPT, max_new_tokens=60, sampling=sampling))
    assert streamed == generator.generate(PROMPT, max_new_tokens=60, sampling=sampling).text


@pytest.mark.parametrize("seed", range(4))
def test_stream_of_broken_bytes_gives_the_text_of_generate(babbler: TextGenerator, seed: int) -> None:
    streamed = "".join(babbler.stream("a", sampling=unlikely_to_stop(seed)))
    generated = babbler.generate("a", sampling=unlikely_to_stop(seed))
    assert "\N{REPLACEMENT CHARACTER}" in generated.text
    assert streamed == generated.text


def test_stream_never_gives_half_a_character(fp32: TextGenerator) -> None:
    prompt, sampling = "the ancient name of Cæsar and Æ", seeded(11)  # goes on: "nold in the reign of Fiünensin"
    sample = fp32.generate(prompt, max_new_tokens=60, sampling=sampling).samples[0]
    assert any(not _is_text(fp32.tokenizer.token_bytes(token_id)) for token_id in sample.ids), "a poor choice of prompt"
    pieces = list(fp32.stream(prompt, max_new_tokens=60, sampling=sampling))
    assert all(pieces)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def _is_text(spelled: bytes) -> bool:
    try:
        return bool(spelled.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def test_the_same_seed_gives_the_same_text(generator: TextGenerator) -> None:
    texts = {generator.generate(PROMPT, max_new_tokens=40, sampling=seeded(5)).text for _ in range(3)}
    assert len(texts) == 1


def test_another_seed_gives_another_text(generator: TextGenerator) -> None:
    texts = {generator.generate(PROMPT, max_new_tokens=40, sampling=seeded(seed)).text for seed in range(5)}
    assert len(texts) == 5


def test_a_seed_that_was_drawn_is_told_and_gives_the_text_again(generator: TextGenerator) -> None:
    first = generator.generate(PROMPT, max_new_tokens=20)
    again = generator.generate(PROMPT, max_new_tokens=20, sampling=replace(generator.default_sampling, seed=first.seed))
    assert again.text == first.text


@pytest.mark.parametrize("samples", [2, 5])
def test_a_sample_is_the_same_however_many_others_are_asked_for(fp32: TextGenerator, samples: int) -> None:
    alone = fp32.generate(PROMPT, max_new_tokens=40, sampling=seeded(9)).samples[0]
    first = fp32.generate(PROMPT, max_new_tokens=40, sampling=seeded(9), num_return_sequences=samples).samples[0]
    assert (first.text, first.ids) == (alone.text, alone.ids)


def test_a_sample_is_the_same_after_another_one_has_ended(babbler: TextGenerator) -> None:
    few, many = (
        babbler.generate("a", sampling=seeded(12), num_return_sequences=samples).samples for samples in (3, 40)
    )
    assert {sample.finish_reason for sample in many} == {"stop", "length"}
    assert [sample.ids for sample in many[:3]] == [sample.ids for sample in few]


def test_samples_differ_from_each_other(generator: TextGenerator) -> None:
    samples = generator.generate(PROMPT, max_new_tokens=40, sampling=seeded(9), num_return_sequences=4).samples
    assert len({sample.text for sample in samples}) == 4


def test_greedy_samples_are_all_alike(generator: TextGenerator) -> None:
    samples = generator.generate(
        PROMPT, max_new_tokens=12, sampling=SamplingOptions.greedy(), num_return_sequences=3
    ).samples
    assert len({sample.text for sample in samples}) == 1


def test_greedy_takes_the_most_probable_token_each_time(fp32: TextGenerator) -> None:
    result = fp32.generate(PROMPT, max_new_tokens=10, sampling=SamplingOptions.greedy())
    sequence = np.array([*result.prompt_ids, *result.samples[0].ids])
    checkpoint = read_checkpoint(DEMO_CHECKPOINT)
    (logits,) = reference_logits(checkpoint.config, checkpoint.tensors, [sequence[:-1]])
    assert logits.argmax(axis=-1)[len(result.prompt_ids) - 1 :].tolist() == list(result.samples[0].ids)


def test_ids_are_as_good_as_text(generator: TextGenerator) -> None:
    ids = generator.tokenizer.encode(PROMPT)
    by_text, by_ids, by_list = (
        generator.generate(prompt, max_new_tokens=20, sampling=seeded(1)) for prompt in (PROMPT, ids, ids.tolist())
    )
    assert by_text.text == by_ids.text == by_list.text
    assert by_text.prompt_ids == by_ids.prompt_ids == tuple(ids.tolist())


def test_many_threads_share_a_generator_and_get_the_single_threaded_texts(generator: TextGenerator) -> None:
    def text(seed: int) -> str:
        prompt = PROMPT[: 5 + seed]
        return generator.generate(prompt, max_new_tokens=30, sampling=seeded(seed), num_return_sequences=2).text

    expected = [text(seed) for seed in range(12)]
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(text, range(12))) == expected


def test_two_streams_may_be_read_in_turns(fp32: TextGenerator) -> None:
    texts = [fp32.generate(PROMPT, max_new_tokens=20, sampling=seeded(seed)).text for seed in (1, 2)]
    streams = [fp32.stream(PROMPT, max_new_tokens=20, sampling=seeded(seed)) for seed in (1, 2)]
    read = ["", ""]
    for _ in range(21):
        for place, stream in enumerate(streams):
            read[place] += next(stream, "")
    assert read == texts


def test_ids_that_change_after_the_request_change_nothing(fp32: TextGenerator) -> None:
    ids = fp32.tokenizer.encode(PROMPT)
    expected = fp32.generate(ids, max_new_tokens=5, sampling=seeded(1)).text
    stream = fp32.stream(ids, max_new_tokens=5, sampling=seeded(1))
    ids[:] = 0
    assert "".join(stream) == expected


# Beginning and end


@pytest.mark.parametrize("prompt", ["", [], np.empty(0, np.int64)], ids=["text", "list", "array"])
def test_an_empty_prompt_starts_from_end_of_text(fp32: TextGenerator, prompt: str) -> None:
    result = fp32.generate(prompt, max_new_tokens=5, sampling=seeded(1))
    assert result.prompt_ids == (8191,)
    assert result.text == fp32.generate([8191], max_new_tokens=5, sampling=seeded(1)).text


def test_a_literal_end_of_text_in_a_prompt_is_ordinary_text(fp32: TextGenerator) -> None:
    result = fp32.generate("<|endoftext|>", max_new_tokens=1)
    assert len(result.prompt_ids) > 1
    assert 8191 not in result.prompt_ids


def test_length_is_why_a_text_ends_that_was_cut(fp32: TextGenerator) -> None:
    sample = fp32.generate(PROMPT, max_new_tokens=3, sampling=seeded(0)).samples[0]
    assert (sample.finish_reason, len(sample.ids), sample.stats.new_tokens) == ("length", 3, 3)


def test_stop_is_why_a_text_ends_that_the_model_ended(babbler: TextGenerator) -> None:
    samples = babbler.generate("a", sampling=seeded(12), num_return_sequences=40).samples
    stopped = [sample for sample in samples if sample.finish_reason == "stop"]
    assert stopped
    assert all(BYTES_AND_END - 1 not in sample.ids for sample in samples)
    assert all(sample.stats.new_tokens == len(sample.ids) + 1 for sample in stopped)


def test_a_stream_that_the_model_ends_holds_no_end_of_text(babbler: TextGenerator) -> None:
    seed = next(
        seed for seed in range(200) if babbler.generate("a", sampling=seeded(seed)).samples[0].finish_reason == "stop"
    )
    assert "<|endoftext|>" not in "".join(babbler.stream("a", sampling=seeded(seed)))


def test_one_new_token_for_each_of_many_samples(fp32: TextGenerator) -> None:
    samples = fp32.generate(PROMPT, max_new_tokens=1, sampling=seeded(0), num_return_sequences=7).samples
    assert [len(sample.ids) for sample in samples] == [1] * 7
    assert {sample.stats.decode_tokens_per_s for sample in samples} == {0.0}


def test_without_a_number_as_many_tokens_as_the_default(fp32: TextGenerator) -> None:
    sample = fp32.generate(PROMPT, sampling=SamplingOptions(seed=0, top_k=5)).samples[0]
    assert len(sample.ids) == DEFAULT_NEW_TOKENS


def test_without_a_number_no_more_tokens_than_there_is_room_for(fp32: TextGenerator) -> None:
    sample = fp32.generate([100] * 500, sampling=seeded(0)).samples[0]
    assert len(sample.ids) == 12


def test_prompt_and_new_tokens_may_fill_the_context(fp32: TextGenerator) -> None:
    assert len(fp32.generate([100] * 511, max_new_tokens=1).samples[0].ids) == 1


def test_statistics_count_the_tokens(fp32: TextGenerator) -> None:
    result = fp32.generate(PROMPT, max_new_tokens=4, sampling=seeded(0))
    stats = result.samples[0].stats
    assert (stats.prompt_tokens, stats.new_tokens) == (len(result.prompt_ids), 4)
    assert stats.ttft_ms > 0
    assert stats.decode_tokens_per_s > 0


def test_the_cache_is_as_large_as_the_request(fp32: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    start = fp32.decoder.start

    def watched(*, batch: int, capacity: int, unforeseen: bool = False) -> object:
        asked.append((batch, capacity))
        return start(batch=batch, capacity=capacity, unforeseen=unforeseen)

    monkeypatch.setattr(fp32.decoder, "start", watched)
    fp32.generate([1, 2, 3], max_new_tokens=5, num_return_sequences=2)
    assert asked == [(2, 3 + 5 - 1)]  # the last token is chosen, not run


def test_padded_rows_of_an_embedding_are_never_chosen(tmp_path: Path) -> None:
    padded = BYTES_AND_END + 200  # half of the rows stand for no token
    package = converted(bytes_checkpoint(tmp_path / "padded", n_vocab=padded), tmp_path, "fp32")
    generator = TextGenerator.load(package)
    assert generator.config.n_vocab == padded
    samples = generator.generate("ab", sampling=unlikely_to_stop(0), num_return_sequences=8).samples
    assert max(token_id for sample in samples for token_id in sample.ids) < BYTES_AND_END


# Refusals


@pytest.mark.parametrize(
    ("n_prompt", "max_new_tokens", "message"),
    [
        (513, None, "513 tokens do not fit the model's context of 512; shorten the prompt$"),
        (512, None, "a prompt of 512 tokens and max_new_tokens 1 do not fit .* of 512; shorten the prompt$"),
        (500, 13, "a prompt of 500 tokens and max_new_tokens 13 .*; shorten the prompt or ask for at most 12$"),
    ],
)
def test_what_the_context_cannot_hold_is_refused(
    fp32: TextGenerator, n_prompt: int, max_new_tokens: int | None, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        fp32.generate([5] * n_prompt, max_new_tokens=max_new_tokens)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
@pytest.mark.parametrize("name", ["max_new_tokens", "num_return_sequences"])
def test_a_number_of_tokens_or_samples_out_of_range_is_refused(fp32: TextGenerator, name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{name} is {value!r}, expected a whole number above 0"):
        fp32.generate("a", **{name: value})  # type: ignore[arg-type]


def test_a_stream_refuses_when_it_is_asked_for_not_when_it_is_read(fp32: TextGenerator) -> None:
    with pytest.raises(RequestError, match="max_new_tokens is 0"):
        fp32.stream("a", max_new_tokens=0)


@pytest.mark.parametrize("samples", [10**9, 10**20])
def test_more_samples_than_memory_holds_are_the_machines_failure(fp32: TextGenerator, samples: int) -> None:
    with pytest.raises(MachineError, match=r"no memory for a cache of .* ask for fewer samples at once"):
        fp32.generate("a", num_return_sequences=samples)


@pytest.mark.parametrize("prompt", [[8192], [-1], [1.5], [[1]], b"bytes"])
def test_a_prompt_that_is_no_text_and_no_ids_is_refused(fp32: TextGenerator, prompt: Sequence[int]) -> None:
    with pytest.raises(RequestError, match="token id"):
        fp32.generate(prompt)


def test_half_a_surrogate_pair_is_no_text(fp32: TextGenerator) -> None:
    with pytest.raises(TokenizerError, match=r"U\+D800, half of a surrogate pair"):
        fp32.generate("\ud800")


def test_every_refusal_is_one_error_to_catch(fp32: TextGenerator, tmp_path: Path) -> None:
    for refused in (lambda: fp32.generate("\ud800"), lambda: fp32.score([]), lambda: TextGenerator.load(tmp_path)):
        with pytest.raises(GPT2EdgeError):
            refused()


def test_prompts_of_different_lengths_go_on_together_as_they_do_alone(fp32: TextGenerator) -> None:
    prompts = ["Once upon a time", PROMPT, "", [5, 6, 7]]
    steps = list(fp32.steps(prompts, max_new_tokens=12, sampling=seeded(3)))
    for index, prompt in enumerate(prompts):
        alone = [chosen[0] for chosen in fp32.steps([prompt], max_new_tokens=12, sampling=seeded(3))]
        assert [chosen[index] for chosen in steps if index in chosen] == alone


def test_no_text_ends_before_min_new_tokens(babbler: TextGenerator) -> None:
    def lengths(min_new_tokens: int) -> list[int]:
        sampling = SamplingOptions(seed=0, top_k=0)
        samples = babbler.generate(
            "a", max_new_tokens=40, min_new_tokens=min_new_tokens, sampling=sampling, num_return_sequences=100
        ).samples
        return [sample.stats.new_tokens for sample in samples]

    assert min(lengths(0)) < 30 <= min(lengths(30))
    assert set(lengths(40)) == {40}


def test_a_logits_processor_sees_the_ids_so_far_and_decides(fp32: TextGenerator) -> None:
    seen: list[list[int]] = []

    def only_nine(ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(list(ids))
        logits[:] = -np.inf
        logits[9] = 0
        return logits

    result = fp32.generate([1, 2], max_new_tokens=3, sampling=seeded(0), logits_processor=only_nine)
    assert result.samples[0].ids == (9, 9, 9)
    assert seen == [[1, 2], [1, 2, 9], [1, 2, 9, 9]]


@pytest.mark.parametrize("min_new_tokens", [-1, 5, 1.0])
def test_min_new_tokens_beyond_max_new_tokens_is_refused(fp32: TextGenerator, min_new_tokens: int) -> None:
    expected = "0 to max_new_tokens, 4|a whole number from 0 up"
    with pytest.raises(RequestError, match=rf"min_new_tokens is .*, expected ({expected})"):
        fp32.generate("a", max_new_tokens=4, min_new_tokens=min_new_tokens)


def test_no_prompts_are_refused(fp32: TextGenerator) -> None:
    with pytest.raises(RequestError, match="no prompts, expected at least one"):
        next(fp32.steps([]))
