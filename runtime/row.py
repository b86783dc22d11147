"""A request made ready, and its rows: the samples under way, each with all that it depends on.

The next token of a row is a function of its request's seed and options, its sample's index in the request, its ids and
the logits: never of the slot in which it runs, nor of what runs beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from .config import GPT2Config
from .decoder import check_ids_are_known, check_room
from .errors import GPT2EdgeError, RequestError
from .request import FinishReason, Generation, Overflow, Prompt, Request, Sample, SampleStats
from .sampling import SamplingOptions, choose_token, fresh_seed, random_uniform
from .tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 128


@dataclass(slots=True)
class Job:
    """A request that was found good, its samples, and what they share."""

    request: Request
    index: int
    prompt: NDArray[np.int64]  # [T], T >= 1
    truncated: int
    max_new_tokens: int
    kept_tokens: int  # how many ids a re-encoding runs again
    sampling: SamplingOptions
    seed: int
    config: GPT2Config
    n_tokens: int  # ids that stand for text; an embedding may have more rows: padding
    started: float  # perf_counter
    rows: list[Row] = field(default_factory=list)
    prompt_logits: NDArray[np.float32] | None = None  # [V] behind the prompt, kept where several samples need them

    @property
    def capacity(self) -> int:
        """Tokens that a row needs room for: the last token is chosen, not run."""
        return min(len(self.prompt) + self.max_new_tokens - 1, self.config.n_ctx)

    @property
    def ended(self) -> bool:
        return len(self.rows) == self.request.num_return_sequences and all(row.ended for row in self.rows)

    def new_rows(self) -> Iterator[Row]:
        """Its samples, each made when it is asked for."""
        for sample in range(self.request.num_return_sequences):
            row = Row(self, sample)
            self.rows.append(row)
            yield row

    def generation(self, tokenizer: Tokenizer) -> Generation:
        """What has come of it.

        Raises:
            GPT2EdgeError: what made a row fail.
        """
        return Generation(
            prompt_ids=tuple(self.prompt.tolist()),
            seed=self.seed,
            samples=tuple(row.result(tokenizer) for row in self.rows),
            truncated=self.truncated,
            index=self.index,
        )


class Row:
    """One sample under way, or ended."""

    __slots__ = ("error", "finish_reason", "ids", "job", "reencoded", "sample", "start", "times")

    def __init__(self, job: Job, sample: int) -> None:
        self.job = job
        self.sample = sample
        self.ids: list[int] = job.prompt.tolist()  # prompt and new tokens
        self.start = 0  # which of the ids stands at position 0
        self.times: list[float] = []  # perf_counter at each new token
        self.reencoded = 0
        self.finish_reason: FinishReason | None = None
        self.error: GPT2EdgeError | None = None

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def new_ids(self) -> list[int]:
        """The ids of its text: without the end-of-text that may have ended it."""
        return self.ids[len(self.job.prompt) : len(self.ids) - (self.finish_reason == "stop")]

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

    def interrupted(self) -> bool:
        """End it if its deadline is over or nobody waits for it any more."""
        request = self.job.request
        if request.cancel is not None and request.cancel.is_set():
            self.finish_reason = "cancelled"
        elif request.deadline_ms is not None and time.perf_counter() >= self.job.started + request.deadline_ms / 1e3:
            self.finish_reason = "deadline"
        return self.finish_reason is not None

    def result(self, tokenizer: Tokenizer) -> Sample:
        """What it has come to.

        Raises:
            GPT2EdgeError: what made it fail.
        """
        if self.error is not None:
            raise self.error
        assert self.finish_reason is not None, "asked for before it had ended"
        kept = self.new_ids
        return Sample(tokenizer.decode(kept), tuple(kept), self.finish_reason, self._stats())

    def _choose(self, logits: NDArray[np.float32]) -> int:
        """Where logits become a token."""
        job = self.job
        logits = logits[: job.n_tokens]
        if len(self.times) < job.request.min_new_tokens:
            logits[job.config.eos_token_id] = -np.inf
        if job.request.logits_processor is not None:
            logits = job.request.logits_processor(self.ids, logits)
        uniform = random_uniform(job.seed, self.sample, len(self.ids)) if job.sampling.do_sample else 0.0
        return choose_token(logits, job.sampling, uniform)

    def _take(self, token_id: int) -> None:
        """Where a row's end is decided."""
        self.ids.append(token_id)
        self.times.append(time.perf_counter())
        if token_id == self.job.config.eos_token_id:
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
        )


def prepare(
    request: Request, *, index: int = 0, tokenizer: Tokenizer, config: GPT2Config, default_sampling: SamplingOptions
) -> Job:
    """Check a request against the model, and settle what it leaves open.

    Raises:
        RequestError: prompt and new tokens do not fit the context, or a value is out of range.
        TokenizerError: the prompt is no text.
    """
    started = time.perf_counter()
    _check_values(request)
    ids = prompt_ids(request.prompt, tokenizer, config)
    if request.overflow == "error":
        check_room(len(ids), config)
    max_new_tokens = _max_new_tokens(request, len(ids), config)
    if type(request.min_new_tokens) is not int or not 0 <= request.min_new_tokens <= max_new_tokens:
        raise RequestError(
            f"min_new_tokens is {request.min_new_tokens!r}, expected 0 to max_new_tokens, {max_new_tokens}"
        )
    truncated = max(0, len(ids) + max_new_tokens - config.n_ctx) if request.overflow == "truncate" else 0
    sampling = request.sampling or default_sampling
    return Job(
        request=request,
        index=index,
        prompt=ids[truncated:],
        truncated=truncated,
        max_new_tokens=max_new_tokens,
        kept_tokens=config.n_ctx - _stride(request, config),
        sampling=sampling,
        seed=fresh_seed() if sampling.seed is None else sampling.seed,
        config=config,
        n_tokens=tokenizer.n_vocab,
        started=started,
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
    for name in ("max_new_tokens", "num_return_sequences"):
        value = getattr(request, name)
        if value is None and name == "max_new_tokens":
            continue
        if type(value) is not int or value < 1:
            raise RequestError(f"{name} is {value!r}, expected a whole number above 0")
    if request.overflow not in get_args(Overflow):
        raise RequestError(f"overflow is {request.overflow!r}, expected one of {', '.join(get_args(Overflow))}")
    deadline_ms = request.deadline_ms
    if deadline_ms is not None and (
        type(deadline_ms) not in (int, float) or math.isnan(deadline_ms) or deadline_ms <= 0
    ):
        raise RequestError(f"deadline_ms is {deadline_ms!r}, expected a number of milliseconds above 0")


def _max_new_tokens(request: Request, n_prompt: int, config: GPT2Config) -> int:
    room = config.n_ctx - n_prompt
    asked = request.max_new_tokens
    if request.overflow == "reencode":
        return asked or DEFAULT_NEW_TOKENS
    if request.overflow == "truncate":
        asked = asked or max(1, min(DEFAULT_NEW_TOKENS, config.n_ctx // 2))
        if asked >= config.n_ctx:
            raise RequestError(
                f"max_new_tokens {asked} leaves no place for the prompt in the model's context of {config.n_ctx}; ask "
                f"for at most {config.n_ctx - 1}, or take overflow 'reencode'"
            )
        return asked
    asked = asked or max(1, min(DEFAULT_NEW_TOKENS, room))
    if asked > room:
        advice = f" or ask for at most {room}" if room else ""
        raise RequestError(
            f"a prompt of {n_prompt} tokens and max_new_tokens {asked} do not fit the model's context of "
            f"{config.n_ctx}; shorten the prompt{advice}"
        )
    return asked


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
