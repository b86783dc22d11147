"""Logits + options + one random number -> token id. Pure numpy, and no state.

Tokens are ranked by logit, equal logits by id, the lower first. Every rule follows that one ranking: greedy takes its
first token, top_k its first k, top_p the shortest beginning that holds enough probability. So exactly k tokens remain
where several tie for the k-th place, and neither a platform nor a numpy version can change which. (typical_p has a
ranking of its own, equals by id again; min_p needs none.)

The random number depends on (seed, sample, position) alone: a sample stays the same whatever else runs in its batch.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from .errors import MachineError, RequestError
from .generation_config import refuse_unhonoured
from .truncation import BLOCK, Rule, cumulative, nucleus, rank_largest, typical

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

TokenIds: TypeAlias = "tuple[int, ...]"

SequenceBias: TypeAlias = "Mapping[int, float] | Mapping[TokenIds, float] | Sequence[tuple[Sequence[int], float]]"
"""What is added to the logit of a token, or of the last token of a sequence where the others have just been written."""

UINT64_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen; the defaults are those of OpenAI's released samples.

    Names and meaning are those of Hugging Face's GenerationConfig, in the order in which it applies them: biases and
    penalties change the logits (`runtime.logits_processors`), then temperature, top_k, top_p, min_p and typical_p say
    what is sampled from. The two penalties that it does not have are those of OpenAI's API.

    Args:
        do_sample: False takes the most probable token each time, biases and penalties included; temperature, top_k,
            top_p, min_p, typical_p, rule and seed are then of no account.
        temperature: above 0; logits are divided by it first.
        top_k: sample among the k most probable tokens; 0 is off.
        top_p: then among the fewest most probable whose probabilities add up to top_p or more; 1.0 is off.
        min_p: then among those at least this many times as probable as the most probable one; 0.0 is off.
        typical_p: then among the fewest whose surprise is nearest to the entropy and whose probabilities add up to
            this or more; 1.0 is off.
        rule: "openai" has top_p keep the most probable tokens whose probabilities add up to top_p or less, at least
            one, as GPT-2's own code does; it knows neither min_p nor typical_p.
        repetition_penalty: logits of tokens that the prompt or the text holds are divided by it, or multiplied where
            they are negative; 1.0 is off.
        presence_penalty: taken from the logits of tokens that were generated, the prompt left out; 0.0 is off.
        frequency_penalty: taken from them as many times as they were generated; 0.0 is off.
        no_repeat_ngram_size: no sequence of this many tokens occurs twice, the prompt included; 0 is off.
        sequence_bias: {id: bias} or {(id, id, ...): bias}, or [[ids, bias], ...] as in JSON; kept as a tuple of pairs.
        bad_words_ids: sequences of token ids that are never completed, one of a lone end-of-text token left out.
        seed: 0 to 2**64 - 1; None lets the caller draw one with `fresh_seed`.
    Raises:
        RequestError: an option is out of range; all such options are named.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    rule: Rule = "hugging_face"
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    sequence_bias: SequenceBias = ()
    bad_words_ids: Sequence[Sequence[int]] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        faults = _out_of_range(self)
        faults += self._freeze("sequence_bias", bias_pairs, "pairs of token ids and a finite number")
        faults += self._freeze("bad_words_ids", _id_sequences, "sequences of token ids")
        if self.rule == "openai" and (self.min_p or self.typical_p != 1):
            faults.append(f"rule is 'openai', which has no min_p ({self.min_p}) and no typical_p ({self.typical_p})")
        if faults:
            raise RequestError("sampling options: " + "; ".join(faults))

    def _freeze(self, name: str, frozen: Callable[[Any], object], expected: str) -> list[str]:
        """Put what was given into tuples, so that options can be compared and hashed; returns what is wrong with it."""
        given = getattr(self, name)
        try:
            object.__setattr__(self, name, frozen(given))
        except (TypeError, ValueError):
            return [f"{name} is {given!r}, expected {expected}"]
        return []

    @classmethod
    def greedy(cls) -> SamplingOptions:
        """The most probable token each time."""
        return cls(do_sample=False)

    @classmethod
    def from_generation_config(cls, values: Mapping[str, Any]) -> SamplingOptions:
        """The sampling part of a Hugging Face generation_config.json; an absent or null option keeps our default.

        Raises:
            RequestError: an option is out of range, or asks for what this runtime does not do.
        """
        refuse_unhonoured(values)
        return cls(**{name: values[name] for name in GENERATION_CONFIG_NAMES if values.get(name) is not None})


GENERATION_CONFIG_NAMES = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"),
    *("no_repeat_ngram_size", "sequence_bias", "bad_words_ids"),
)
"""Of the options, those that Hugging Face has too."""


def bias_pairs(bias: SequenceBias) -> tuple[tuple[TokenIds, float], ...]:
    """Each sequence of token ids and its bias, whatever form they were given in; a sequence given again counts last.

    Raises:
        TypeError, ValueError: they have no such form.
    """
    pairs = bias.items() if isinstance(bias, Mapping) else bias
    merged = {token_ids([ids] if isinstance(ids, int) else ids): value for ids, value in pairs}
    if not all(map(_is_number, merged.values())):
        raise ValueError("a bias is no finite number")
    return tuple((ids, float(value)) for ids, value in merged.items())


def _id_sequences(sequences: Iterable[Iterable[int]]) -> tuple[TokenIds, ...]:
    return tuple(dict.fromkeys(map(token_ids, sequences)))


def token_ids(ids: Iterable[int]) -> TokenIds:
    """Token ids as a tuple of plain integers.

    Raises:
        TypeError, ValueError: they are none, or negative, or no whole numbers.
    """
    given = tuple(ids)
    numbers = tuple(map(index, given))
    if not numbers or min(numbers) < 0 or any(isinstance(token_id, bool) for token_id in given):
        raise ValueError("no token ids")
    return numbers


def _out_of_range(options: SamplingOptions) -> list[str]:
    """What is wrong with the options that are no sequences."""
    faults = [
        f"{name} is {getattr(options, name)!r}, expected {expected}"
        for name, (holds, expected) in _EXPECTED.items()
        if not holds(getattr(options, name))
    ]
    if options.temperature == 0:
        faults.append("for the most probable token each time: do_sample=False")
    return faults


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


_EXPECTED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (lambda value: type(value) is bool, "true or false"),
    "temperature": (_is_positive, "a finite number above 0"),
    "top_k": (_is_count, "a whole number from 1 up, or 0 for off"),
    "top_p": (_is_share, "a number above 0 and up to 1 (off)"),
    "min_p": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 (off) to 1"),
    "typical_p": (_is_share, "a number above 0 and up to 1 (off)"),
    "rule": (lambda value: value in get_args(Rule), " or ".join(get_args(Rule))),
    "repetition_penalty": (_is_positive, "a finite number above 0; 1 is off"),
    "presence_penalty": (_is_number, "a finite number; 0 is off"),
    "frequency_penalty": (_is_number, "a finite number; 0 is off"),
    "no_repeat_ngram_size": (_is_count, "a whole number from 1 up, or 0 for off"),
    "seed": (
        lambda value: value is None or (_is_count(value) and value <= UINT64_MASK),
        "a whole number from 0 to 2**64 - 1",
    ),
}


def fresh_seed() -> int:
    """A seed from the operating system, short enough to be typed again (32 bits)."""
    return secrets.randbits(32)


def random_uniform(seed: int, sample: int, position: int) -> float:
    """The random number of one token: a multiple of 2**-53 in [0, 1), the same on every platform, for ever.

    The first word of Philox4x64-10 with key (seed, sample) and counter (position, 0, 0, 0). In plain integers it takes
    4 microseconds, half of what making a numpy.random.Philox costs, and no numpy version can change it.

    Args:
        seed: 0 to 2**64 - 1.
        sample: index of the sample in the request, never its row in some batch.
        position: index of the token that is chosen.
    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), section 3.3.
    """
    word0, word1, word2, word3 = position, 0, 0, 0
    key0, key1 = seed, sample
    for _ in range(10):
        product0, product2 = 0xD2E7470EE14C6C93 * word0, 0xCA5A826395121157 * word2
        word0, word1 = (product2 >> 64) ^ word1 ^ key0, product2 & UINT64_MASK
        word2, word3 = (product0 >> 64) ^ word3 ^ key1, product0 & UINT64_MASK
        key0, key1 = (key0 + 0x9E3779B97F4A7C15) & UINT64_MASK, (key1 + 0xBB67AE8584CAA73B) & UINT64_MASK
    return (word0 >> 11) * 2.0**-53


def choose_token(logits: Float32Array, options: SamplingOptions, uniform: float) -> int:
    """Choose the next token: one of those that the options keep, by the inverse of the cumulative distribution.

    Args:
        logits: [V] float32, biases and penalties applied; -inf forbids a token.
        options: how to choose.
        uniform: in [0, 1), from `random_uniform`; greedy choice ignores it.
    Returns:
        A token id, 0 to V - 1.
    Raises:
        MachineError: a logit is NaN or +inf, or all are -inf.
    """
    _refuse_broken(logits)
    if not options.do_sample:
        return int(np.argmax(logits))
    kept, weights = _kept(logits, options)
    sums = cumulative(weights)
    place = int(np.searchsorted(sums, uniform * sums[-1], side="right"))
    return place if kept is None else int(kept[place])


def warp_logits(logits: Float32Array, options: SamplingOptions) -> Float32Array:
    """The logits that `choose_token` chooses by: divided by the temperature, -inf where a token is not kept.

    Args:
        logits: [V] float32, biases and penalties applied.
        options: how to choose; greedy choice leaves the logits as they are.
    Returns:
        [V] float32, what transformers' generate returns as `scores`.
    Raises:
        MachineError: a logit is NaN or +inf, or all are -inf.
    """
    _refuse_broken(logits)
    if not options.do_sample:
        return logits
    kept, _ = _kept(logits, options)
    with np.errstate(all="ignore"):
        scaled: Float32Array = logits / np.float32(options.temperature)
        if not np.isfinite(scaled.max()):  # a temperature near 0: the same distribution, its largest logit at 0
            scaled = ((logits.astype(np.float64) - logits.max()) / options.temperature).astype(np.float32)
    if kept is None:
        return scaled
    warped = np.full(logits.size, -np.inf, np.float32)
    warped[kept] = scaled[kept]
    return warped


def _kept(logits: Float32Array, options: SamplingOptions) -> tuple[Int64Array | None, Float32Array]:
    """Tokens that may be chosen, [n] int64 or None for all, and their probabilities up to a factor, [n] float32.

    A temperature keeps the ranking, so top_k is taken first and only the k logits are divided.
    """
    kept = rank_largest(logits, options.top_k) if 0 < options.top_k < logits.size else None
    values = logits if kept is None else logits[kept]
    weights = _weights(values, options.temperature)
    for rule in _rules(options):
        chosen = rule(weights, values)
        kept, weights, values = chosen if kept is None else kept[chosen], weights[chosen], values[chosen]
    return kept, weights


def _rules(options: SamplingOptions) -> Iterator[Callable[[Float32Array, Float32Array], Int64Array]]:
    """What else narrows the choice, in this order: weights [n] and their logits [n] -> indices of those to keep."""
    if options.top_p < 1:
        yield lambda weights, values: nucleus(weights, values, options.top_p, options.rule)
    if options.min_p:
        yield lambda weights, _: np.flatnonzero(weights >= options.min_p)
    if options.typical_p < 1:
        yield lambda weights, _: typical(weights, options.typical_p)


def _refuse_broken(logits: Float32Array) -> None:
    peak = logits.max()  # NaN if any logit is
    if not np.isfinite(peak):
        fault = "every logit is -inf" if peak == -np.inf else f"a logit is {peak}"
        raise MachineError(
            f"no token can be chosen: {fault}, expected finite logits; "
            "the package or the device computes wrongly: check it with python -m runtime.verify PACKAGE --full"
        )


def _weights(logits: Float32Array, temperature: float) -> Float32Array:
    """exp((logit - largest) / temperature): probabilities up to a factor, [N] float32 in [0, 1], the largest 1."""
    largest = np.float64(logits.max())
    weights = np.empty_like(logits)
    # A quotient beyond float's range is -inf and weighs 0, as it should.
    with np.errstate(over="ignore", under="ignore"):
        for start in range(0, logits.size, BLOCK):
            scaled = logits[start : start + BLOCK].astype(np.float64)
            scaled -= largest
            scaled /= temperature
            weights[start : start + BLOCK] = scaled
        np.exp(weights, out=weights)  # a fifth of float64's time
    return weights
