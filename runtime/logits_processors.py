"""Biases, penalties and bans: what changes a row's logits before a token is chosen from them.

Each is what the class of transformers 4.57.6 that it names computes, and they follow each other as in its `generate`.
A row's logits depend on nothing but its own ids, so a row may be rewound, forked or moved to another place at will.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import RequestError
from .sampling import SamplingOptions, TokenIds, bias_pairs

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

Edit: TypeAlias = "Callable[[Float32Array, Int64Array, int], None]"
"""Changes logits [V] in place; sees the row's ids so far, prompt included [T], and how many of them are the prompt."""


class LogitsProcessors:
    """The biases, penalties and bans of one request, compiled. Immutable: its rows, and threads, share one."""

    def __init__(
        self,
        options: SamplingOptions,
        *,
        n_vocab: int,
        eos_ids: Sequence[int] = (),
        min_new_tokens: int = 0,
    ) -> None:
        """Compile what the options ask for.

        Args:
            options: temperature, top_k and what else is sampled by is not looked at.
            n_vocab: V, token ids from which one may be chosen.
            eos_ids: tokens that end a text.
            min_new_tokens: none of them is chosen before this many tokens were.
        Raises:
            RequestError: an id is not in the vocabulary.
        """
        biases = bias_pairs(options.sequence_bias)
        bans = [(tuple(ids), -np.inf) for ids in options.bad_words_ids if not (len(ids) == 1 and ids[0] in eos_ids)]
        named = {token_id for ids, _ in [*biases, *bans] for token_id in ids}.union(eos_ids)
        if outside := sorted(token_id for token_id in named if not 0 <= token_id < n_vocab):
            raise RequestError(
                f"sequence_bias, bad_words_ids or end ids name token ids {outside[:10]}, expected 0 to {n_vocab - 1}"
            )
        self._edits: list[Edit] = []
        if biases:
            self._edits.append(_Completions(biases).bias)
        if options.repetition_penalty != 1:
            self._edits.append(partial(penalize_repetition, penalty=options.repetition_penalty))
        if options.presence_penalty or options.frequency_penalty:
            presence, frequency = options.presence_penalty, options.frequency_penalty
            self._edits.append(partial(penalize_generated, presence=presence, frequency=frequency))
        if options.no_repeat_ngram_size:
            self._edits.append(partial(ban_repeated_ngrams, size=options.no_repeat_ngram_size))
        if bans:
            self._edits.append(_Completions(bans).bias)
        if min_new_tokens and eos_ids:
            self._edits.append(partial(ban_early_end, eos_ids=list(eos_ids), min_new_tokens=min_new_tokens))

    @property
    def edits(self) -> bool:
        """Whether anything was asked for."""
        return bool(self._edits)

    def apply(self, logits: Float32Array, *, ids: Sequence[int] | Int64Array, prompt_length: int) -> Float32Array:
        """Apply all of them to one row.

        Args:
            logits: [V] float32, or log-probabilities; left as they are.
            ids: [T] the row's ids so far, prompt included.
            prompt_length: how many of them are the prompt.
        Returns:
            [V] float32; the logits themselves where nothing was asked for.
        Raises:
            RequestError: no token is left to choose.
        """
        if not self._edits:
            return logits
        edited: Float32Array = logits.copy()
        array = np.asarray(ids, np.int64)
        for edit in self._edits:
            edit(edited, array, prompt_length)
        if edited.max() == -np.inf and logits.max() > -np.inf:
            raise RequestError(
                f"the options forbid every token behind {len(array)} others; allow some: no_repeat_ngram_size, "
                "bad_words_ids or min_new_tokens ask for too much"
            )
        return edited


def penalize_repetition(logits: Float32Array, ids: Int64Array, prompt_length: int, *, penalty: float) -> None:
    """Divide positive logits of tokens that occur in the row, multiply negative ones: RepetitionPenaltyLogitsProcessor.

    Source: Keskar et al., CTRL: A Conditional Transformer Language Model (2019), section 4.1.
    """
    seen = _choosable(ids, logits)
    values = logits[seen]
    logits[seen] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))


def penalize_generated(
    logits: Float32Array, ids: Int64Array, prompt_length: int, *, presence: float, frequency: float
) -> None:
    """Take presence + frequency * count from the logits of tokens that were generated; transformers has no such class.

    Source: the parameters presence_penalty and frequency_penalty of OpenAI's API, as its documentation gives them.
    """
    tokens, counts = np.unique(_choosable(ids[prompt_length:], logits), return_counts=True)
    logits[tokens] -= (presence + frequency * counts).astype(np.float32)


def ban_repeated_ngrams(logits: Float32Array, ids: Int64Array, prompt_length: int, *, size: int) -> None:
    """Ban what would complete a sequence of `size` tokens that the row holds already: NoRepeatNGramLogitsProcessor."""
    n_before = size - 1
    n_starts = len(ids) - n_before
    if n_starts < 1:
        return
    repeats = np.ones(n_starts, np.bool_)  # the last size - 1 tokens have occurred here before
    for offset in range(n_before):
        repeats &= ids[offset : offset + n_starts] == ids[n_starts + offset]
    logits[_choosable(ids[n_before:][repeats], logits)] = -np.inf


def ban_early_end(
    logits: Float32Array, ids: Int64Array, prompt_length: int, *, eos_ids: list[int], min_new_tokens: int
) -> None:
    """Ban the tokens that end a text before its time: MinNewTokensLengthLogitsProcessor."""
    if len(ids) - prompt_length < min_new_tokens:
        logits[eos_ids] = -np.inf


def _choosable(ids: Int64Array, logits: Float32Array) -> Int64Array:
    """The ids that have a logit: a prompt of ids may name rows that pad an embedding, which stand for no token."""
    return ids[ids < logits.size]


class _Completions:
    """Biases of tokens where they would complete a sequence: SequenceBiasLogitsProcessor, NoBadWordsLogitsProcessor.

    Both of these look for a sequence of n tokens only in a row that has n or more; so does this.
    """

    def __init__(self, biases: Iterable[tuple[TokenIds, float]]) -> None:
        by_prefix: dict[TokenIds, dict[int, float]] = defaultdict(dict)
        for ids, bias in biases:
            by_prefix[ids[:-1]][ids[-1]] = bias
        self._by_prefix = {
            prefix: (np.array(list(last), np.int64), np.array(list(last.values()), np.float32))
            for prefix, last in by_prefix.items()
        }
        self._lengths = sorted(set(map(len, self._by_prefix)))

    def bias(self, logits: Float32Array, ids: Int64Array, prompt_length: int) -> None:
        for length in self._lengths:
            if length and length >= len(ids):
                return
            prefix = tuple(ids[len(ids) - length :].tolist())
            if found := self._by_prefix.get(prefix):
                tokens, values = found
                logits[tokens] += values
