"""Which tokens may be chosen at all: the beginnings of a ranking that top_k, top_p, min_p and typical_p keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

Rule = Literal["hugging_face", "openai"]
"""How far top_p reaches. hugging_face: up to the token with which the sum of the probabilities reaches it. openai: the
tokens before which and with which the sum stays within it, at least one, as in GPT-2's own code."""

RANK_COLUMNS = 1024
"""Columns whose maxima bound the k-th largest logit: 0.04 ms for 50,257 logits, where np.argpartition takes 0.4 ms."""

BIN_SHIFT = 18
"""Drops 18 of float32's 23 mantissa bits: bins 1/32 of their value wide, 4,065 of them up to 1.0."""

BLOCK = 8192
"""Values taken at a time where a step needs them as float64 or as indices: for 50,257 values, an array of 400 kB costs
0.1 ms in page faults, more than what is done with it."""

LIGHTEST = np.finfo(np.float32).smallest_normal
"""Stands in for less, which may have no logarithm."""

BIN_OF_ONE = int(np.float32(1).view(np.uint32)) >> BIN_SHIFT


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


def nucleus(weights: Float32Array, logits: Float32Array, top_p: float, rule: Rule) -> Int64Array:
    """Find the largest weights whose sum is top_p of the whole: just enough or just not too many, as the rule says.

    Args:
        weights: [N] float32 in [0, 1], the largest 1.
        logits: [N] float32: rank the weights, which round to equals.
        top_p: in (0, 1).
        rule: "hugging_face" as transformers' TopPLogitsWarper; "openai" as top_p_logits in src/sample.py of
            openai/gpt-2. Equals are taken by index, the lower first, by either.
    Returns:
        Indices, [n] int64, n >= 1.
    """
    return _shortest_beginning(weights, BIN_OF_ONE - _bins(weights), lambda border: -logits[border], top_p, rule)


def typical(weights: Float32Array, mass: float) -> Int64Array:
    """Find the fewest tokens that hold `mass` of the whole, the least surprising first, as TypicalLogitsWarper does.

    Surprising is what lies far from the entropy H. With w = p * Z: |-log p - H| = |log w - mean of log w under p|.

    Args:
        weights: [N] float32 in [0, 1], the largest 1.
        mass: in (0, 1), typical_p.
    Returns:
        Indices, [n] int64, n >= 1; of equally surprising tokens those with the lower index.
    Source: Meister et al., Locally Typical Sampling (TACL 2023), section 4.
    """
    distance = np.maximum(weights, LIGHTEST)
    np.log(distance, out=distance)
    centre = (weights * distance).sum(dtype=np.float64) / weights.sum(dtype=np.float64)
    np.abs(np.subtract(distance, np.float32(centre), out=distance), out=distance)
    return _shortest_beginning(weights, _bins(distance), lambda border: distance[border], mass, "hugging_face")


def cumulative(weights: Float32Array) -> Float64Array:
    """Sums of the first 1, 2, ... weights, [N] float64."""
    sums = weights.astype(np.float64)
    return np.cumsum(sums, out=sums)  # in place: no second array to be faulted in


def _bins(values: Float32Array) -> npt.NDArray[np.int16]:
    """Order float32 values >= 0 coarsely by their upper bits, [N] int16."""
    return (values.view(np.uint32) >> BIN_SHIFT).astype(np.int16)


def _shortest_beginning(
    weights: Float32Array,
    bins: npt.NDArray[np.int16],
    ranks: Callable[[Int64Array], npt.NDArray[np.floating]],
    share: float,
    rule: Rule,
) -> Int64Array:
    """Find the first of a ranking that hold `share` of all weight.

    One histogram stands in for the sort: whole bins are taken from the lowest on, and only the bin in which the sum
    reaches its goal is ranked.

    Args:
        weights: [N] float32.
        bins: [N] int16 >= 0, the coarse rank.
        ranks: gives the rank of some indices within a bin, the lower first, equals by index.
        share: in (0, 1).
        rule: whether the token that reaches the goal is kept.
    Returns:
        Indices, [n] int64, n >= 1.
    """
    by_bin = np.zeros(int(bins.max()) + 1)
    for start in range(0, weights.size, BLOCK):
        block = slice(start, start + BLOCK)
        by_bin += np.bincount(bins[block], weights=weights[block], minlength=by_bin.size)
    np.cumsum(by_bin, out=by_bin)
    goal = share * by_bin[-1]
    side: Literal["left", "right"] = "left" if rule == "hugging_face" else "right"
    border = np.searchsorted(by_bin, goal, side)
    before, at_border = np.flatnonzero(bins < border), np.flatnonzero(bins == border)
    at_border = at_border[np.argsort(ranks(at_border), kind="stable")]
    reached = weights[before].sum(dtype=np.float64) + cumulative(weights[at_border])
    count = int(np.searchsorted(reached, goal, side)) + (rule == "hugging_face")
    return np.concatenate([before, at_border[: max(count, not before.size)]])
