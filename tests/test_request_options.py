"""What a request asks for beyond its prompt reaches the loop, in `generate`, in streams and on the command line."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from runtime import Request, RequestError, SamplingOptions, TextGenerator
from runtime.beam_search import BeamSearchOptions, search_beams
from runtime.generate import main
from runtime.request import RequestOptions

GREEDY = SamplingOptions.greedy()
SAMPLED = SamplingOptions(seed=3)
PROMPT = "It was a dark and stormy night, and"
CLOSE = 1e-3
"""Nats. Measured: a log-probability of one run and of steps differ by 1e-5 at fp32."""


@pytest.fixture(scope="module")
def fp32(demo_fp32: Path) -> TextGenerator:
    return TextGenerator.load(demo_fp32)


@pytest.fixture(scope="module")
def int8(demo_int8: Path) -> TextGenerator:
    return TextGenerator.load(demo_int8)


def test_the_keywords_are_the_fields_of_a_request() -> None:
    assert {field.name for field in fields(Request)} == RequestOptions.__annotations__.keys() | {"prompt"}


def test_a_stop_string_ends_the_text_before_it_in_a_stream_too(fp32: TextGenerator) -> None:
    whole = fp32.generate(PROMPT, sampling=SAMPLED, max_new_tokens=40).text
    stop = whole[15:19]
    sample = fp32.generate(PROMPT, sampling=SAMPLED, max_new_tokens=40, stop_strings=[stop, "never this"]).samples[0]
    assert sample.text == whole[: whole.index(stop)]
    assert sample.finish_reason == "stop"
    assert stop in fp32.tokenizer.decode(sample.ids)
    pieces = list(fp32.stream(PROMPT, sampling=SAMPLED, max_new_tokens=40, stop_strings=stop))
    assert "".join(pieces) == sample.text and len(pieces) > 1


def test_each_of_several_end_ids_ends_the_text(fp32: TextGenerator) -> None:
    ids = fp32.generate(PROMPT, sampling=SAMPLED, max_new_tokens=30).samples[0].ids
    ends = [ids[20], ids[9]]
    first = min(ids.index(end) for end in ends)
    sample = fp32.generate(PROMPT, sampling=SAMPLED, max_new_tokens=30, eos_token_id=ends).samples[0]
    assert (sample.ids, sample.finish_reason) == (ids[:first], "stop")
    kept = fp32.generate(PROMPT, sampling=SAMPLED, max_new_tokens=30, min_new_tokens=25, eos_token_id=ends).samples[0]
    assert not set(ends) & set(kept.ids[:25])


def test_log_probabilities_are_those_of_the_score(fp32: TextGenerator) -> None:
    prompt = fp32.tokenizer.encode(PROMPT)
    sample = fp32.generate(prompt, sampling=SAMPLED, max_new_tokens=12, top_logprobs=3).samples[0]
    assert [told.token_id for told in sample.logprobs] == list(sample.ids)
    scores = fp32.score([*prompt, *sample.ids])[len(prompt) - 1 :]
    np.testing.assert_allclose([told.log_probability for told in sample.logprobs], scores, atol=CLOSE)
    for told in sample.logprobs:
        assert len(told.top) == 3 and told.top[0][1] >= told.log_probability


def test_log_probabilities_are_of_the_model_whatever_a_callback_writes(fp32: TextGenerator) -> None:
    def only_the_seventh(_ids: object, logits: np.ndarray) -> np.ndarray:
        logits[:] = -np.inf
        logits[7] = 0
        return logits

    sample = fp32.generate(PROMPT, max_new_tokens=2, logits_processor=only_the_seventh, top_logprobs=0).samples[0]
    assert [told.token_id for told in sample.logprobs] == [7, 7]
    assert all(told.log_probability < -CLOSE and told.top == () for told in sample.logprobs)


def test_penalties_and_bans_shape_the_text(fp32: TextGenerator) -> None:
    plain = fp32.generate(PROMPT, sampling=GREEDY, max_new_tokens=60).samples[0].ids
    options = SamplingOptions(do_sample=False, no_repeat_ngram_size=2, bad_words_ids=[[plain[0]]])
    prompt = fp32.tokenizer.encode(PROMPT).tolist()
    ids = fp32.generate(prompt, sampling=options, max_new_tokens=60).samples[0].ids
    pairs = list(pairwise([*prompt, *ids]))
    assert len(set(pairs)) == len(pairs)
    assert plain[0] not in ids


def test_beams_are_those_of_the_search(fp32: TextGenerator) -> None:
    result = fp32.generate(PROMPT, sampling=GREEDY, num_beams=3, num_return_sequences=2, max_new_tokens=12)
    expected = search_beams(
        fp32.decoder,
        fp32.tokenizer.encode(PROMPT),
        beams=BeamSearchOptions(num_beams=3),
        sampling=GREEDY,
        n_vocab=fp32.tokenizer.n_vocab,
        eos_ids=[fp32.config.eos_token_id],
        max_new_tokens=12,
        num_return_sequences=2,
    )
    assert [(s.ids, s.beam_score) for s in result.samples] == [(beam.ids, beam.score) for beam in expected]
    assert result.samples[0].text == fp32.tokenizer.decode(expected[0].ids)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_guesses_leave_the_text_as_it_is(fp32: TextGenerator, sampling: SamplingOptions) -> None:
    plain = fp32.generate(PROMPT, sampling=sampling, max_new_tokens=80)
    guessed = fp32.generate(PROMPT, sampling=sampling, max_new_tokens=80, prompt_lookup=True)
    assert guessed.samples[0].ids == plain.samples[0].ids
    told = guessed.samples[0].stats.speculation
    assert told is not None and told.tokens == 79 and plain.samples[0].stats.speculation is None
    assert "".join(fp32.stream(PROMPT, sampling=sampling, max_new_tokens=80, prompt_lookup=True)) == plain.text


def test_a_draft_package_guesses_and_exact_texts_are_the_same_to_the_last_bit(
    demo_int8: Path, demo_int4: Path, int8: TextGenerator
) -> None:
    drafted = TextGenerator.load(demo_int8, draft=demo_int4)
    for seed in range(3):
        sampling = SamplingOptions(seed=seed)
        alone = int8.generate(PROMPT, sampling=sampling, max_new_tokens=40, exact=True).samples[0]
        guessed = drafted.generate(PROMPT, sampling=sampling, max_new_tokens=40, exact=True).samples[0]
        assert guessed.ids == alone.ids
        assert guessed.stats.speculation is not None
    assert drafted.generate(PROMPT, sampling=SAMPLED, num_return_sequences=2, max_new_tokens=3).samples[1].ids


def test_guesses_go_past_the_context_too(fp32: TextGenerator) -> None:
    asked = {"sampling": GREEDY, "max_new_tokens": 700, "overflow": "reencode"}
    plain, guessed = fp32.generate(PROMPT, **asked), fp32.generate(PROMPT, prompt_lookup=True, **asked)
    assert guessed.samples[0].ids == plain.samples[0].ids
    assert guessed.samples[0].stats.reencoded == plain.samples[0].stats.reencoded > 0


def test_a_prefix_cache_leaves_the_text_as_it_is(demo_int8: Path, int8: TextGenerator) -> None:
    generator = TextGenerator.load(demo_int8, prefix_cache_bytes=1 << 24)
    beginning = PROMPT * 8
    for end in (" one", " two", " one"):
        expected = int8.generate(beginning + end, sampling=SAMPLED, max_new_tokens=10)
        assert generator.generate(beginning + end, sampling=SAMPLED, max_new_tokens=10).text == expected.text
    assert generator.prefix_cache is not None and generator.prefix_cache.reused_tokens > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2, "sampling": GREEDY, "deadline_ms": 5}, "beam search does not do deadline_ms"),
        ({"num_beams": 2, "sampling": GREEDY, "stop_strings": "."}, "beam search does not do stop_strings"),
        ({"num_beams": 2, "sampling": SAMPLED}, "beam search does not sample"),
        ({"num_beams": 2, "sampling": GREEDY, "overflow": "reencode"}, "cannot go past the context"),
        ({"length_penalty": 2.0}, "length_penalty and early_stopping are for beam search"),
        ({"num_beams": 0}, "num_beams is 0, expected a whole number above 0"),
        ({"top_logprobs": -1}, "top_logprobs is -1, expected a whole number from 0 up"),
        ({"prompt_lookup": True, "num_return_sequences": 2}, "for one sample at a time, num_return_sequences is 2"),
        ({"prompt_lookup": "no"}, "prompt_lookup is 'no', expected true or false"),
        ({"stop_strings": ""}, "stop_strings is '', expected strings of at least one character"),
        ({"eos_token_id": 10**6}, "expected 0 to"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fp32: TextGenerator, options: RequestOptions, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        fp32.generate(PROMPT, **options)


def test_what_one_text_alone_can_have_is_refused_elsewhere(fp32: TextGenerator) -> None:
    with pytest.raises(RequestError, match="only generate searches beams"):
        fp32.stream(PROMPT, sampling=GREEDY, num_beams=2)
    with pytest.raises(RequestError, match="a stream is one text"):
        fp32.stream(PROMPT, num_return_sequences=2)
    for options in ({"prompt_lookup": True}, {"exact": True}):
        with pytest.raises(RequestError, match="prompt_lookup and exact are for one sample at a time"):
            list(fp32.generate_many([Request(PROMPT, **options)]))


def test_a_draft_of_another_tokenizer_is_refused(demo_int8: Path, tiny_fp32: Path) -> None:
    with pytest.raises(RequestError, match="its tokenizer is another one"):
        TextGenerator.load(demo_int8, draft=tiny_fp32)


def test_a_package_that_would_search_beams_by_default_is_refused(demo_fp32: Path, fp32: TextGenerator) -> None:
    class Asking:
        manifest = fp32.package.manifest

        def generation_config(self) -> dict[str, object]:
            return {"num_beams": 4}

    with pytest.raises(RequestError, match="generation_config asks for num_beams 4"):
        TextGenerator(Asking(), fp32.decoder, fp32.tokenizer)  # type: ignore[arg-type]


def test_the_command_line_takes_them(demo_fp32: Path, fp32: TextGenerator, capsys: pytest.CaptureFixture[str]) -> None:
    common = [str(demo_fp32), PROMPT, "--max-new-tokens", "30"]
    whole = fp32.generate(PROMPT, sampling=SAMPLED, max_new_tokens=30).text
    stop = whole[12:15]
    assert main([*common, "--seed", "3", "--stop", stop]) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop)] + "\n"
    assert main([*common, "--greedy", "--num-beams", "2", "--num-return-sequences", "2", "--json"]) == 0
    scores = [sample["beam_score"] for sample in json.loads(capsys.readouterr().out)["samples"]]
    assert scores == sorted(scores, reverse=True)
    assert main([*common, "--seed", "3", "--prompt-lookup", "--top-logprobs", "2", "--json"]) == 0
    (sample,) = json.loads(capsys.readouterr().out)["samples"]
    assert sample["text"] == whole and len(sample["logprobs"]) == 30 and sample["stats"]["speculation"]["runs"] > 0
    assert main([*common, "--greedy", "--no-repeat-ngram-size", "1"]) == 0
    words = fp32.tokenizer.encode(capsys.readouterr().out).tolist()
    assert len(words) > 10


def test_the_command_line_refuses_what_contradicts(demo_fp32: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--greedy", "--min-p", "0.1"], "--greedy takes no --min-p"),
        (["--top-logprobs", "2"], "--top-logprobs is for --json and --prompts"),
        (["--prompts", "-", "--draft", "other"], "--draft, --prompt-lookup and --exact are for one PROMPT at a time"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(demo_fp32), *([] if "--prompts" in options else [PROMPT]), *options])
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_what_a_callback_returns_is_checked(fp32: TextGenerator) -> None:
    top_p = SamplingOptions(seed=3, top_p=0.9)
    expected = fp32.generate(PROMPT, sampling=top_p, max_new_tokens=8).text
    wide = fp32.generate(PROMPT, sampling=top_p, max_new_tokens=8, logits_processor=lambda _, x: x.astype(np.float64))  # type: ignore[arg-type, return-value]
    assert wide.text == expected
    for returned, message in (
        (lambda _, x: None, "logits_processor returned NoneType, expected the logits, float32"),
        (lambda _, x: x[:-1], "logits_processor returned float32 "),
        (lambda _, x: np.full_like(x, -np.inf), "logits_processor forbids every token"),
    ):
        with pytest.raises(RequestError, match=message):
            fp32.generate(PROMPT, max_new_tokens=2, logits_processor=returned)
