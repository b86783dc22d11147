"""A request made ready, and its rows: the samples under way, each with all that it depends on.

The next token of a row is a function of its request's seed and options, its sample's index in the request, its ids and
the logits: never of the slot in which it runs, nor of what runs beside it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from .config import GPT2Config
from .decoder import check_ids_are_known, check_room
from .errors import GPT2EdgeError, RequestError
from .log_probabilities import TokenLogProbability, log_probabilities
from .logits_processors import LogitsProcessors
from .request import FinishReason, Generation, LogitsProcessor, Overflow, Prompt, Request, Sample, SampleStats
from .sampling import SamplingOptions, choose_token, fresh_seed, random_uniform
from .speculation import SpeculationStats
from .stopping import DEFAULT_NEW_TOKENS, GrowingText, StoppingOptions
from .tokenizer import Tokenizer


@dataclass(slots=True)
class Job:
    """A request that was found good, its samples, and what they share."""

    request: Request
    index: int
    prompt: NDArray[np.int64]  # [T], T >= 1
    truncated: int
    max_new_tokens: int
    min_new_tokens: int
    stopping: StoppingOptions
    processors: LogitsProcessors
    kept_tokens: int  # how many ids a re-encoding runs again
    sampling: SamplingOptions
    seed: int
    config: GPT2Config
    tokenizer: Tokenizer
    started: float  # perf_counter
    rows: list[Row] = field(default_factory=list)
    follows_text: bool = False  # tell its text while it grows
    prompt_logits: NDArray[np.float32] | None = None  # [V] behind the prompt, kept where several samples need them

    @property
    def capacity(self) -> int:
        """Tokens that a row needs room for: the last token is chosen, not run."""
        return min(len(self.prompt) + self.max_new_tokens - 1, self.config.n_ctx)

    @property
    def wanted(self) -> int | None:
        """How many of the largest logits matter to the choice of a token; None for all."""
        request, sampling = self.request, self.sampling
        seen = request.logits_processor is not None or request.top_logprobs is not None or self.processors.edits
        if seen or self.tokenizer.n_vocab < self.config.n_vocab:
            return None
        return (sampling.top_k or None) if sampling.do_sample else 1

    @property
    def ended(self) -> bool:
        return len(self.rows) == self.request.num_return_sequences and all(row.ended for row in self.rows)

    def new_rows(self) -> Iterator[Row]:
        """Its samples, each made when it is asked for."""
        for sample in range(self.request.num_return_sequences):
            row = Row(self, sample)
            self.rows.append(row)
            yield row

    def generation(self) -> Generation:
        """What has come of it.

        Raises:
            GPT2EdgeError: what made a row fail.
        """
        return Generation(
            prompt_ids=tuple(self.prompt.tolist()),
            seed=self.seed,
            samples=tuple(row.result() for row in self.rows),
            truncated=self.truncated,
            index=self.index,
        )


class Row:
    """One sample under way, or ended."""

    __slots__ = (
        *("ended_by_id", "error", "finish_reason", "ids", "job", "logprobs", "reencoded", "sample", "speculation"),
        *("start", "text", "times"),
    )

    def __init__(self, job: Job, sample: int) -> None:
        self.job = job
        self.sample = sample
        self.ids: list[int] = job.prompt.tolist()  # prompt and new tokens
        self.start = 0  # which of the ids stands at position 0
        self.times: list[float] = []  # perf_counter at each new token
        self.reencoded = 0
        self.logprobs: list[TokenLogProbability] = []
        self.speculation: SpeculationStats | None = None
        self.text = GrowingText(job.tokenizer, job.stopping.stop_strings) if job.follows_text else None
        self.finish_reason: FinishReason | None = None
        self.ended_by_id = False
        self.error: GPT2EdgeError | None = None

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def new_ids(self) -> list[int]:
        """The ids of its text: without the end id that may have ended it."""
        return self.ids[len(self.job.prompt) : len(self.ids) - self.ended_by_id]

    @property
    def is_full(self) -> bool:
        """Its ids take more positions than there are: the window must be put at the beginning again."""
        return len(self.ids) - self.start > self.job.config.n_ctx

    def slide(self) -> None:
        """Forget all but the last ids, which are to be run again."""
        self.start = len(self.ids) - self.job.kept_tokens
        self.reencoded += bool(self.times)

    def advance(self, logits: NDArray[np.float32]) -> None:
        """Take one more token, from the logits [V] behind the last one; they may be changed.

        What goes wrong with this row alone is kept in `error`: others go on.
        """
        try:
            self._take(self._choose(logits))
        except GPT2EdgeError as error:
            self.error = error

    def take(self, logits: NDArray[np.float32]) -> int | None:
        """`advance`, and tell the token: None if the row has ended."""
        self.advance(logits)
        return None if self.ended else self.ids[-1]

    def interrupted(self) -> bool:
        """End it if its deadline is over or nobody waits for it any more."""
        request = self.job.request
        if request.cancel is not None and request.cancel.is_set():
            self.finish_reason = "cancelled"
        elif request.deadline_ms is not None and time.perf_counter() >= self.job.started + request.deadline_ms / 1e3:
            self.finish_reason = "deadline"
        return self.finish_reason is not None

    def choose(
        self, ids: Sequence[int], logits: NDArray[np.float32], logits_processor: LogitsProcessor | None = None
    ) -> int:
        """The token that this sample takes behind ids, from logits [V]; also where another package guesses it."""
        job = self.job
        logits = logits[: job.tokenizer.n_vocab]  # an embedding may have more rows: padding
        logits = job.processors.apply(logits, ids=ids, prompt_length=len(job.prompt))
        if logits_processor is not None:
            logits = _processed(logits_processor(ids, logits), n_vocab=job.tokenizer.n_vocab)
        uniform = random_uniform(job.seed, self.sample, len(ids)) if job.sampling.do_sample else 0.0
        return choose_token(logits, job.sampling, uniform)

    def result(self) -> Sample:
        """What it has come to.

        Raises:
            GPT2EdgeError: what made it fail.
        """
        if self.error is not None:
            raise self.error
        assert self.finish_reason is not None, "asked for before it had ended"
        kept = self.new_ids
        if self.text is None:
            text = self.job.tokenizer.decode(kept)
        else:
            self.text.finish()
            text = self.text.text
        return Sample(text, tuple(kept), self.finish_reason, self._stats(), tuple(self.logprobs))

    def _choose(self, logits: NDArray[np.float32]) -> int:
        """Where logits become a token."""
        request = self.job.request
        given = logits[: self.job.tokenizer.n_vocab]
        if request.top_logprobs is None:
            return self.choose(self.ids, given, request.logits_processor)
        token_id = self.choose(self.ids, given.copy(), request.logits_processor)  # the caller's function may write
        self.logprobs.append(log_probabilities(given, token_id, top=request.top_logprobs))
        return token_id

    def _take(self, token_id: int) -> None:
        """Where a row's end is decided."""
        self.ids.append(token_id)
        self.times.append(time.perf_counter())
        if token_id in self.job.stopping.eos_ids:
            self.finish_reason, self.ended_by_id = "stop", True
        elif self.text is not None and self.text.push(token_id):
            self.finish_reason = "stop"
        elif len(self.times) == self.job.max_new_tokens:
            self.finish_reason = "length"

    def _stats(self) -> SampleStats:
        times = self.times
        return SampleStats(
            prompt_tokens=len(self.job.prompt),
            new_tokens=len(times),
            ttft_ms=(times[0] - self.job.started) * 1e3 if times else 0.0,
            decode_tokens_per_s=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0,
            itl_ms=tuple((after - before) * 1e3 for before, after in pairwise(times)),
            reencoded=self.reencoded,
            speculation=self.speculation,
        )


def _processed(logits: object, *, n_vocab: int) -> NDArray[np.float32]:
    """What a logits_processor gave back, float32 whatever numbers it computed in.

    Raises:
        RequestError: it is no row of n_vocab numbers, or none of them can be chosen.
    """
    if not isinstance(logits, np.ndarray) or logits.shape != (n_vocab,) or logits.dtype.kind not in "fiu":
        found = f"{logits.dtype} {logits.shape}" if isinstance(logits, np.ndarray) else type(logits).__name__
        raise RequestError(f"logits_processor returned {found}, expected the logits, float32 ({n_vocab},)")
    if logits.max() == -np.inf:
        raise RequestError("logits_processor forbids every token: it returned -inf alone; have it leave one")
    return logits.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What requests leave open."""

    tokenizer: Tokenizer
    config: GPT2Config
    sampling: SamplingOptions
    stopping: StoppingOptions


def prepare(request: Request, defaults: Defaults, *, index: int = 0) -> Job:
    """Check a request against the model, and settle what it leaves open.

    Raises:
        RequestError: prompt and new tokens do not fit the context, a value is out of range, or options exclude each
            other.
        TokenizerError: the prompt is no text.
    """
    started = time.perf_counter()
    _check_values(request)
    tokenizer, config = defaults.tokenizer, defaults.config
    ids = prompt_ids(request.prompt, tokenizer, config)
    if request.overflow == "error":
        check_room(len(ids), config)
    names = ("max_new_tokens", "min_new_tokens", "eos_token_id", "stop_strings")
    given = {name: value for name in names if (value := getattr(request, name)) is not None}
    stopping = replace(defaults.stopping, **given)
    min_new_tokens, max_new_tokens = _new_tokens(request.overflow, stopping, len(ids), config)
    truncated = max(0, len(ids) + max_new_tokens - config.n_ctx) if request.overflow == "truncate" else 0
    sampling = request.sampling or defaults.sampling
    return Job(
        request=request,
        index=index,
        prompt=ids[truncated:],
        truncated=truncated,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        stopping=stopping,
        processors=LogitsProcessors(
            sampling, n_vocab=tokenizer.n_vocab, eos_ids=stopping.eos_ids, min_new_tokens=min_new_tokens
        ),
        kept_tokens=config.n_ctx - _stride(request, config),
        sampling=sampling,
        seed=fresh_seed() if sampling.seed is None else sampling.seed,
        config=config,
        tokenizer=tokenizer,
        started=started,
        follows_text=bool(stopping.stop_strings),
    )


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer, config: GPT2Config) -> NDArray[np.int64]:
    """Ids [T] of a prompt, T >= 1.

    Raises:
        RequestError: the ids are no row of whole numbers, or out of range.
        TokenizerError: the prompt is no text.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else as_ids(prompt)
    if not ids.size:
        ids = np.array([config.eos_token_id], np.int64)
    check_ids_are_known(ids, config)
    return ids


def as_ids(ids: Prompt) -> NDArray[np.int64]:
    """Ids as an array of our own; whether it is a row of integers is for others to check."""
    try:
        return np.array(ids if len(ids) else np.empty(0, np.int64))
    except (TypeError, ValueError) as error:
        raise RequestError(f"token ids are no array ({error}), expected one row of integers") from error


def _check_values(request: Request) -> None:
    """Refuse what is out of range for any prompt and any model."""
    for name in ("num_return_sequences", "num_beams"):
        value = getattr(request, name)
        if type(value) is not int or value < 1:
            raise RequestError(f"{name} is {value!r}, expected a whole number above 0")
    for name in ("prompt_lookup", "exact"):
        value = getattr(request, name)
        if type(value) is not bool:
            raise RequestError(f"{name} is {value!r}, expected true or false")
    top = request.top_logprobs
    if top is not None and (type(top) is not int or top < 0):
        raise RequestError(f"top_logprobs is {top!r}, expected a whole number from 0 up, or None for none")
    if request.num_beams == 1 and (request.length_penalty != 1 or request.early_stopping is not False):
        raise RequestError(
            "length_penalty and early_stopping are for beam search; ask for num_beams too, or leave them"
        )
    if request.num_beams > 1 and request.overflow == "reencode":
        raise RequestError("beam search cannot go past the context; take another overflow than 'reencode'")
    if request.num_return_sequences > 1 and (request.prompt_lookup or request.exact):
        raise RequestError(
            f"prompt_lookup and exact are for one sample at a time, num_return_sequences is "
            f"{request.num_return_sequences}; ask for them one by one"
        )
    if request.overflow not in get_args(Overflow):
        raise RequestError(f"overflow is {request.overflow!r}, expected one of {', '.join(get_args(Overflow))}")
    deadline_ms = request.deadline_ms
    if deadline_ms is not None and (
        type(deadline_ms) not in (int, float) or math.isnan(deadline_ms) or deadline_ms <= 0
    ):
        raise RequestError(f"deadline_ms is {deadline_ms!r}, expected a number of milliseconds above 0")


def _new_tokens(overflow: Overflow, stopping: StoppingOptions, n_prompt: int, config: GPT2Config) -> tuple[int, int]:
    """Fewest and most new tokens."""
    if overflow == "error":
        return stopping.new_tokens(n_prompt, n_ctx=config.n_ctx)
    if overflow == "truncate" and stopping.max_new_tokens is None and stopping.max_length is None:
        stopping = replace(stopping, max_new_tokens=max(1, min(DEFAULT_NEW_TOKENS, config.n_ctx // 2)))
    fewest, most = stopping.new_tokens(n_prompt, n_ctx=sys.maxsize)
    if overflow == "truncate" and most >= config.n_ctx:
        raise RequestError(
            f"max_new_tokens {most} leaves no place for the prompt in the model's context of {config.n_ctx}; ask for "
            f"at most {config.n_ctx - 1}, or take overflow 'reencode'"
        )
    return fewest, most


def _stride(request: Request, config: GPT2Config) -> int:
    stride = request.reencode_stride
    if request.overflow != "reencode":
        if stride is not None:
            raise RequestError(f"reencode_stride is {stride!r}, but overflow is {request.overflow!r}; leave it out")
        return 0
    if stride is None:
        stride = config.n_ctx // 2
    if type(stride) is not int or not 1 <= stride < config.n_ctx:
        raise RequestError(f"reencode_stride is {stride!r}, expected a whole number from 1 to {config.n_ctx - 1}")
    return stride
