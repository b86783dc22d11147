"""The shapes that a TensorRT engine is built for: one profile, in which every run of our runtime fits."""

from __future__ import annotations

from runtime.config import GPT2Config
from runtime.decoder import CHUNK_TOKENS
from runtime.package import ATTENTION_MASK, CACHE_KINDS, INPUT_IDS, POSITION_IDS, ShapeProfile, past_name

MOST_ROWS = 8
"""Rows of a batch: an engine's memory grows with the largest shapes it must serve."""


def shape_profile(config: GPT2Config) -> ShapeProfile:
    """Shapes of all inputs, from a first token alone to a piece of a prompt at the end of the context.

    TensorRT takes each axis between its own ends, but wants the mask to be as long as past and new tokens together at
    all three points; so its longest is longer than the context, which no run reaches.
    """
    longest_piece = min(CHUNK_TOKENS, config.n_ctx)
    return {
        "min": _shapes(config, rows=1, past=0, new=1),
        "opt": _shapes(config, rows=1, past=config.n_ctx // 2, new=1),
        "max": _shapes(config, rows=MOST_ROWS, past=config.n_ctx - 1, new=longest_piece),
    }


def _shapes(config: GPT2Config, *, rows: int, past: int, new: int) -> dict[str, tuple[int, ...]]:
    cache = (rows, config.n_head, past, config.head_dim)
    return {
        INPUT_IDS: (rows, new),
        ATTENTION_MASK: (rows, past + new),
        POSITION_IDS: (rows, new),
        **{past_name(layer, kind): cache for layer in range(config.n_layer) for kind in CACHE_KINDS},
    }
