"""What is asked for and what comes of it: values that a caller makes and reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from .errors import GPT2EdgeError
from .log_probabilities import TokenLogProbability
from .sampling import SamplingOptions
from .speculation import SpeculationStats

Prompt: TypeAlias = "str | Sequence[int] | NDArray[np.int64]"
"""Text, or token ids. Empty means unconditional: the model starts from its end-of-text token."""

LogitsProcessor: TypeAlias = "Callable[[Sequence[int], NDArray[np.float32]], NDArray[np.float32]]"
"""Called before each choice with the row's ids so far, prompt included, and the logits [V], which it may change in
place; returns the logits to choose from."""

Overflow = Literal["error", "truncate", "reencode"]
"""What becomes of a prompt that does not fit the context together with max_new_tokens.

error: it is refused. truncate: its beginning is left out, so that the last n_ctx - max_new_tokens ids remain.
reencode: whenever the n_ctx positions are taken, the last n_ctx - reencode_stride ids are run again at positions 0, 1,
2 ..., and the others are forgotten; so max_new_tokens may be any number. A model with learned positions knows no other
way: keys and values that stay when older ones are dropped would stand at wrong positions.
"""

FinishReason = Literal["stop", "length", "deadline", "cancelled"]
"""stop: an end id or a stop string ended the text. length: max_new_tokens were written. deadline: deadline_ms were
over. cancelled: the caller's `cancel` was set."""


class Cancellation(Protocol):
    """What tells that nobody waits for the text any more: a threading.Event, set from any thread."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how to continue it; `TextGenerator` checks it when it takes it.

    Args:
        prompt: text or token ids; empty for text out of nothing.
        max_new_tokens: the most that is written; None takes the package's, or else 128, or less: with overflow "error"
            what the context has room for, with "truncate" half the context.
        min_new_tokens: no end id is chosen before this many.
        eos_token_id: one id, or several, each of which ends the text; None takes the package's.
        stop_strings: one string, or several: the text ends before the first of them that is complete; `ids` hold it.
        sampling: how tokens are chosen; None takes the package's own defaults (`TextGenerator.default_sampling`).
        num_return_sequences: independent samples of the same prompt. Sample i is the same however many are asked for.
        logits_processor: sees, and may change, what each token is chosen from, after biases, penalties and bans.
        top_logprobs: have each token's log-probability told, and those of so many most probable ones: of the logits as
            the model gave them. None tells none.
        num_beams: 2 or more searches so many beams instead, for `generate` alone; with it go length_penalty and
            early_stopping, see `BeamSearchOptions`.
        prompt_lookup: guess the next tokens from what followed the same words before, and check several in one run: see
            `runtime.speculation`. For one sample at a time. A generator that has a draft package guesses by that,
            unless this asks otherwise.
        exact: have the text be the same to the last bit with and without guesses, at every precision. For one sample.
        overflow: what becomes of a prompt that does not fit the context together with max_new_tokens.
        reencode_stride: tokens that a re-encoding makes room for, 1 to n_ctx - 1; None takes half the context. The
            more, the fewer re-encodings, and the less the model remembers just behind one.
        deadline_ms: from the call to the end; then the samples end as they stand. Looked at before each token, and
            between the pieces of a long prompt.
        cancel: set from any thread, it ends the samples as they stand; looked at as often.
    """

    prompt: Prompt = ""
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    stop_strings: str | Sequence[str] | None = None
    sampling: SamplingOptions | None = None
    num_return_sequences: int = 1
    logits_processor: LogitsProcessor | None = None
    top_logprobs: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    prompt_lookup: bool = False
    exact: bool = False
    overflow: Overflow = "error"
    reencode_stride: int | None = None
    deadline_ms: float | None = None
    cancel: Cancellation | None = None


class SessionOptions(TypedDict, total=False):
    """Those fields of `Request` that a session takes too; what it is asked to go on with, and how, is its own."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    eos_token_id: int | Sequence[int] | None
    stop_strings: str | Sequence[str] | None
    logits_processor: LogitsProcessor | None
    top_logprobs: int | None
    deadline_ms: float | None
    cancel: Cancellation | None


class RequestOptions(SessionOptions, total=False):
    """The fields of `Request` but for the prompt, as keyword arguments."""

    sampling: SamplingOptions | None
    num_return_sequences: int
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    prompt_lookup: bool
    exact: bool
    overflow: Overflow
    reencode_stride: int | None


@dataclass(frozen=True, slots=True)
class SampleStats:
    """Times of one sample; a number that no token stands behind is 0."""

    prompt_tokens: int
    new_tokens: int  # the end-of-text that may have ended it included
    ttft_ms: float  # from the call to the first token, tokenisation included
    decode_tokens_per_s: float  # tokens after the first
    itl_ms: tuple[float, ...]  # [new_tokens - 1], from each token to the next: a re-encoding shows here
    reencoded: int  # times that the window was run again
    speculation: SpeculationStats | None = None  # what guessing came to, where there was any


@dataclass(frozen=True, slots=True)
class Sample:
    """A continuation. `ids` are its tokens without the end id that may have ended it, `text` is their text.

    Where a stop string ended it, `text` ends before the string.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: SampleStats
    logprobs: tuple[TokenLogProbability, ...] = ()  # of each new token, an end id included, if they were asked for
    beam_score: float | None = None  # of a text that beam search found


@dataclass(frozen=True, slots=True)
class Generation:
    """What a request gave. The same seed gives the same samples again."""

    prompt_ids: tuple[int, ...]  # those that were run
    seed: int
    samples: tuple[Sample, ...]
    truncated: int = 0  # ids of the prompt's beginning that were left out
    index: int = 0  # the request's place among those of `generate_many`
    error: GPT2EdgeError | None = None  # why there are no samples: only where `generate_many` returns errors

    @property
    def text(self) -> str:
        """The text of the first sample; where the request failed, its error is raised."""
        if self.error is not None:
            raise self.error
        return self.samples[0].text
