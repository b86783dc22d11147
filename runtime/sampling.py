"""Logits + options + one random number -> token id. Pure numpy, and no state.

Tokens are ranked by logit, equal logits by id, the lower first. Every rule follows that one ranking: greedy takes its
first token, top_k its first k, top_p the shortest beginning that holds enough probability. So exactly k tokens remain
where several tie for the k-th place, and neither a platform nor a numpy version can change which.

The random number depends on (seed, sample, position) alone: a sample stays the same whatever else runs in its batch.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import MachineError, RequestError

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

UINT64_MASK = (1 << 64) - 1

RANK_COLUMNS = 1024
"""Columns whose maxima bound the k-th largest logit: 0.04 ms for 50,257 logits, where np.argpartition takes 0.4 ms."""

NUCLEUS_BIN_SHIFT = 18
"""Drops 18 of float32's 23 mantissa bits: bins 1/32 of their value wide, 4,065 of them up to 1.0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen; the defaults are those of OpenAI's released samples.

    Args:
        do_sample: False takes the most probable token each time and ignores every other option.
        temperature: above 0; logits are divided by it first.
        top_k: sample among the k most probable tokens; 0 is off.
        top_p: then among the fewest most probable whose probabilities add up to top_p or more; 1.0 is off.
        seed: 0 to 2**64 - 1; None lets the caller draw one with `fresh_seed`.
    Raises:
        RequestError: an option is out of range; all such options are named.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 40
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        faults = []
        if type(self.do_sample) is not bool:
            faults.append(f"do_sample is {self.do_sample!r}, expected true or false")
        if not _is_number(self.temperature) or not 0 < self.temperature < math.inf:
            advice = " (for the most probable token each time: do_sample=False)" if self.temperature == 0 else ""
            faults.append(f"temperature is {self.temperature!r}, expected a finite number above 0{advice}")
        if type(self.top_k) is not int or self.top_k < 0:
            faults.append(f"top_k is {self.top_k!r}, expected a whole number from 1 up, or 0 for off")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            faults.append(f"top_p is {self.top_p!r}, expected a number above 0 and up to 1 (off)")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed <= UINT64_MASK):
            faults.append(f"seed is {self.seed!r}, expected a whole number from 0 to 2**64 - 1")
        if faults:
            raise RequestError("sampling options: " + "; ".join(faults))

    @classmethod
    def greedy(cls) -> SamplingOptions:
        """The most probable token each time."""
        return cls(do_sample=False)

    @classmethod
    def from_generation_config(cls, values: Mapping[str, Any]) -> SamplingOptions:
        """The sampling part of a Hugging Face generation_config.json; an absent or null option keeps our default.

        Raises:
            RequestError: an option is out of range.
        """
        names = ("do_sample", "temperature", "top_k", "top_p")
        return cls(**{name: values[name] for name in names if values.get(name) is not None})


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
    """Choose the next token: temperature, then top_k, then top_p, then the inverse of the cumulative distribution.

    A temperature keeps the ranking, so top_k is taken first and only the k logits are divided.

    Args:
        logits: [V] float32; -inf forbids a token.
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
    if 0 < options.top_k < logits.size:
        kept = rank_largest(logits, options.top_k)
        weights = _weights(logits[kept], options.temperature)
    else:
        kept = np.arange(logits.size)
        weights = _weights(logits, options.temperature)
    if options.top_p < 1:
        nucleus = _nucleus(weights, logits[kept], options.top_p)
        kept, weights = kept[nucleus], weights[nucleus]
    cumulative = _cumulative(weights)
    return int(kept[np.searchsorted(cumulative, uniform * cumulative[-1], side="right")])


def rank_largest(values: Float32Array, count: int) -> Int64Array:
    """Find the `count` largest values, the largest first, equal values by index, the lower first.

    Args:
        values: [N] float32 without NaN.
        count: 1 to N.
    Returns:
        Indices, [count] int64.
    """
    candidates = np.flatnonzero(values >= _lower_bound(values, count))
    order = np.argsort(-values[candidates], kind="stable")
    return candidates[order[:count]]


def _lower_bound(values: Float32Array, count: int) -> np.float32:
    """A number that at least `count` of the values reach, and hardly more of them."""
    rows = values.size // RANK_COLUMNS
    if rows > 1 and count <= RANK_COLUMNS // 4:
        # Each of the `count` largest column maxima is a value of its own.
        values = values[: rows * RANK_COLUMNS].reshape(rows, RANK_COLUMNS).max(axis=0)
    bound: np.float32 = np.partition(values, -count)[-count]
    return bound


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
    # A quotient beyond float's range is -inf and weighs 0, as it should.
    with np.errstate(over="ignore", under="ignore"):
        scaled = logits.astype(np.float64)
        scaled -= scaled.max()
        scaled /= temperature
        weights: Float32Array = np.exp(scaled.astype(np.float32))  # a fifth of float64's time
    return weights


def _nucleus(weights: Float32Array, logits: Float32Array, top_p: float) -> Int64Array:
    """Find the fewest largest weights whose sum is at least top_p of the whole, as transformers' TopPLogitsWarper does.

    One histogram stands in for the sort: the upper bits of a float32 >= 0 order it coarsely, so whole bins are taken
    from the top, and only the bin in which the sum reaches its goal is ranked: by logit, for weights round to equals.

    Returns:
        Indices, [n] int64, n >= 1.
    """
    bins = (weights.view(np.uint32) >> NUCLEUS_BIN_SHIFT).astype(np.intp)
    from_top = np.cumsum(np.bincount(bins, weights=weights)[::-1])
    goal = top_p * from_top[-1]
    border = from_top.size - 1 - np.searchsorted(from_top, goal)
    above, at_border = np.flatnonzero(bins > border), np.flatnonzero(bins == border)
    at_border = at_border[np.argsort(-logits[at_border], kind="stable")]
    reached = weights[above].sum(dtype=np.float64) + _cumulative(weights[at_border])
    return np.concatenate([above, at_border[: np.searchsorted(reached, goal) + 1]])


def _cumulative(weights: Float32Array) -> Float64Array:
    sums = weights.astype(np.float64)
    return np.cumsum(sums, out=sums)  # in place: a second array this large costs more in page faults than the sum
