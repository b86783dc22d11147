"""Beam search, as transformers 4.57.6 does it: the most probable texts instead of the most probable tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .decoder import Decoder
from .errors import RequestError
from .log_probabilities import log_normalizer
from .logits_processors import LogitsProcessors
from .request import Generation, Request, Sample, SampleStats
from .row import Job
from .sampling import SamplingOptions
from .truncation import rank_largest

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

UNHONOURED = ("logits_processor", "top_logprobs", "prompt_lookup", "exact", "deadline_ms", "cancel")
"""Options of a request that beam search would have to ignore."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchOptions:
    """How beams are searched. Names and meaning are those of Hugging Face's GenerationConfig.

    Args:
        num_beams: texts that are followed at a time, 2 or more.
        length_penalty: a finished text's score is the sum of its tokens' log-probabilities divided by its number of new
            tokens to this power: above 0 favours long texts.
        early_stopping: True ends as soon as num_beams texts are finished; False when the best unfinished one, as long
            as it is now, does not beat the worst of them; "never" when it could not at max_new_tokens either.
    Raises:
        RequestError: an option is out of range; all such options are named.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        faults = []
        if type(self.num_beams) is not int or self.num_beams < 2:
            faults.append(f"num_beams is {self.num_beams!r}, expected a whole number from 2 up; without beams: None")
        if type(self.length_penalty) not in (int, float) or not np.isfinite(self.length_penalty):
            faults.append(f"length_penalty is {self.length_penalty!r}, expected a finite number")
        if type(self.early_stopping) is not bool and self.early_stopping != "never":
            faults.append(f"early_stopping is {self.early_stopping!r}, expected true, false or 'never'")
        if faults:
            raise RequestError("beam search options: " + "; ".join(faults))

    @classmethod
    def from_generation_config(cls, values: Mapping[str, Any]) -> BeamSearchOptions | None:
        """The part of a Hugging Face generation_config.json that is about beams; None where it asks for none.

        Raises:
            RequestError: an option is out of range, or renormalize_logits, which this search does not do.
        """
        given = {name: values[name] for name in cls.__slots__ if values.get(name) is not None}
        if given.get("num_beams", 1) == 1:
            return None
        if values.get("renormalize_logits"):
            raise RequestError("generation_config asks for renormalize_logits, which beam search does not do here")
        return cls(**given)


@dataclass(frozen=True, slots=True)
class Beam:
    """A finished text: its new tokens, the end id that may have ended it included, and its score."""

    ids: tuple[int, ...]
    score: float  # sum of log-probabilities / len(ids) ** length_penalty


def refuse_beams(values: Mapping[str, Any]) -> None:
    """Refuse a Hugging Face generation_config.json that makes beam search the default.

    Raises:
        RequestError: it does, and what to do instead.
    """
    if beams := BeamSearchOptions.from_generation_config(values):
        raise RequestError(
            f"generation_config asks for num_beams {beams.num_beams}, which is no default here: it can neither stream "
            "nor sample; set it to 1 there, and ask for beams with generate(num_beams=...)"
        )


def search_texts(decoder: Decoder, job: Job) -> Generation:
    """Answer a request by beam search; its samples are the texts found, the best first.

    Raises:
        RequestError: the request asks for what beam search does not do, or as `search_beams`.
        MachineError: memory ran out, or the graph cannot be run.
    """
    request = job.request
    without_them = Request(num_beams=request.num_beams)
    asked = [name for name in UNHONOURED if getattr(request, name) != getattr(without_them, name)]
    if job.stopping.stop_strings:
        asked.append("stop_strings")
    if asked:
        raise RequestError(f"beam search does not do {', '.join(asked)}; leave them out, or leave num_beams out")
    beams = search_beams(
        decoder,
        job.prompt,
        beams=BeamSearchOptions(
            num_beams=request.num_beams, length_penalty=request.length_penalty, early_stopping=request.early_stopping
        ),
        sampling=job.sampling,
        n_vocab=job.tokenizer.n_vocab,
        eos_ids=job.stopping.eos_ids,
        max_new_tokens=job.max_new_tokens,
        min_new_tokens=job.min_new_tokens,
        num_return_sequences=request.num_return_sequences,
    )
    return Generation(
        prompt_ids=tuple(job.prompt.tolist()),
        seed=job.seed,
        samples=tuple(_sample(beam, job) for beam in beams),
        truncated=job.truncated,
    )


def _sample(beam: Beam, job: Job) -> Sample:
    """A text as a sample: its tokens came all at once, so they have no times of their own."""
    by_id = beam.ids[-1] in job.stopping.eos_ids
    kept = beam.ids[:-1] if by_id else beam.ids
    stats = SampleStats(
        prompt_tokens=len(job.prompt),
        new_tokens=len(beam.ids),
        ttft_ms=0.0,
        decode_tokens_per_s=0.0,
        itl_ms=(),
        reencoded=0,
    )
    text = job.tokenizer.decode(kept)
    return Sample(text, kept, "stop" if by_id else "length", stats, beam_score=beam.score)


def search_beams(
    decoder: Decoder,
    prompt: Int64Array,
    *,
    beams: BeamSearchOptions,
    sampling: SamplingOptions,
    n_vocab: int,
    eos_ids: Sequence[int],
    max_new_tokens: int,
    min_new_tokens: int = 0,
    num_return_sequences: int = 1,
) -> tuple[Beam, ...]:
    """Find the most probable continuations of a prompt.

    The beams are rows that are decoded together. A row stays where it is as long as its text goes on: only a text that
    goes on in two ways is copied.

    Args:
        decoder: the model.
        prompt: [T] int64, T >= 1; with max_new_tokens it fits the context.
        beams: how to search.
        sampling: biases, penalties and bans, which change the log-probabilities of each step.
        n_vocab: ids that have a text; others are never chosen.
        eos_ids: tokens that end a text.
        max_new_tokens: a text that is this long is finished.
        min_new_tokens: no text ends before this many.
        num_return_sequences: texts to return, num_beams at most.
    Returns:
        The texts, the best first.
    Raises:
        RequestError: sampling was asked for, more texts than beams, or an id that is not in the vocabulary; or options
            leave too few texts.
        MachineError: memory ran out, or the graph cannot be run.
    """
    if sampling.do_sample:
        raise RequestError(
            "beam search does not sample, but do_sample is true; ask for do_sample=False or no num_beams"
        )
    if not 1 <= num_return_sequences <= beams.num_beams:
        raise RequestError(
            f"num_return_sequences is {num_return_sequences}, expected 1 to num_beams, {beams.num_beams}"
        )
    processors = LogitsProcessors(sampling, n_vocab=n_vocab, eos_ids=eos_ids, min_new_tokens=min_new_tokens)
    search = BeamSearch(beams, eos_ids=eos_ids, max_new_tokens=max_new_tokens)
    decoding = decoder.start(batch=beams.num_beams, capacity=len(prompt) + max_new_tokens - 1)
    logits = np.broadcast_to(decoding.prefill(0, prompt), (beams.num_beams, decoder.config.n_vocab))
    decoding.cache.take_rows(np.zeros(beams.num_beams, np.int64))
    rows = np.arange(beams.num_beams)  # where each beam stands
    while True:
        texts = [[*prompt.tolist(), *ids] for ids in search.ids]
        log_probabilities = [
            processors.apply(row - np.float32(log_normalizer(row)), ids=ids, prompt_length=len(prompt))
            for row, ids in zip(logits[rows, :n_vocab], texts, strict=True)
        ]
        parents, tokens = search.advance(np.stack(log_probabilities))
        if search.done:
            return search.best(num_return_sequences)
        rows, sources = _place(rows, parents)
        decoding.cache.take_rows(sources)
        logits = decoding.decode_step(tokens[np.argsort(rows)])


class BeamSearch:
    """The bookkeeping of one search: pure, no model. Scores are float32, as in transformers.

    A beam that has nothing to go on with has the score -inf: at first all but one, since they would be the same text.
    """

    def __init__(self, options: BeamSearchOptions, *, eos_ids: Sequence[int], max_new_tokens: int) -> None:
        self._options = options
        self._eos_ids = np.array(eos_ids, np.int64)
        self._max_new_tokens = max_new_tokens
        self._scores = np.full(options.num_beams, -np.inf, np.float32)  # sums of log-probabilities, the best first
        self._scores[0] = 0
        self._finished: list[Beam] = []  # num_beams at most, the best first
        self.ids: list[list[int]] = [[] for _ in range(options.num_beams)]  # new tokens of each beam
        self.done = False

    def advance(self, log_probabilities: Float32Array) -> tuple[Int64Array, Int64Array]:
        """Take the next token of each beam.

        Args:
            log_probabilities: [N, V] float32, biases and penalties applied.
        Returns:
            For each new beam the beam that it continues, and its last token, [N] int64 each.
        """
        n_beams, n_vocab = log_probabilities.shape
        totals = (log_probabilities + self._scores[:, None]).ravel()
        # Even if each beam could end by every end id, n_beams others are left to go on with.
        candidates = rank_largest(totals, max(2, 1 + len(self._eos_ids)) * n_beams)
        candidates = candidates[totals[candidates] > -np.inf]
        parents, tokens = np.divmod(candidates, n_vocab)
        n_new = len(self.ids[0]) + 1
        ended = np.isin(tokens, self._eos_ids) | (n_new == self._max_new_tokens)
        for rank in np.flatnonzero(ended[:n_beams]):
            ids = (*self.ids[parents[rank]], int(tokens[rank]))
            score = float(totals[candidates[rank]] / np.float32(n_new**self._options.length_penalty))
            self._finished.append(Beam(ids, score))
        self._finished = sorted(self._finished, key=lambda beam: -beam.score)[:n_beams]
        going = np.flatnonzero(~ended)[:n_beams]
        self._scores = np.full(n_beams, -np.inf, np.float32)
        self._scores[: going.size] = totals[candidates[going]]
        if self._is_done(going.size, n_new):
            self.done = True
            return np.arange(n_beams), np.zeros(n_beams, np.int64)
        going = np.resize(going, n_beams)  # beams with nothing to go on with repeat others, at -inf
        self.ids = [[*self.ids[parents[rank]], int(tokens[rank])] for rank in going]
        return parents[going], tokens[going]

    def best(self, count: int) -> tuple[Beam, ...]:
        """The best finished texts, the best first.

        Raises:
            RequestError: there are not that many.
        """
        if len(self._finished) < count:
            raise RequestError(
                f"num_return_sequences is {count}, but the options leave {len(self._finished)} texts; ask for fewer"
            )
        return tuple(self._finished[:count])

    def _is_done(self, n_going: int, n_new: int) -> bool:
        options = self._options
        if not n_going:
            return True
        if len(self._finished) < options.num_beams:
            return False
        if options.early_stopping is True:
            return True
        at_most = options.early_stopping == "never" and options.length_penalty > 0
        length = self._max_new_tokens if at_most else n_new
        return bool(self._scores[0] / length**options.length_penalty <= self._finished[-1].score)


def _place(rows: Int64Array, parents: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Find a row for each new beam: its parent's for the first child of each, a row that has become free for others.

    Returns:
        The row of each beam, and for each row the row that it is to be copied from, [N] int64 each.
    """
    placed, sources = np.full_like(rows, -1), np.arange(len(rows))
    first_children = np.unique(parents, return_index=True)[1]
    placed[first_children] = rows[parents[first_children]]
    free = np.setdiff1d(rows, placed)
    placed[placed < 0] = free
    sources[placed] = rows[parents]
    return placed, sources
