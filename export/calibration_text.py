"""Text to calibrate on: what the model itself writes, or a file of the user's.

Own text needs no data set and is what the model will meet when it writes. A plain int8 graph writes it, many rows at
once: a quarter of the time that float32 would take, and its KL of a few thousandths is nothing to a sample.

Source: Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models" (2023), section 2.1, for
calibrating on a model's own samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from runtime.config import GPT2Config
from runtime.decoder import Decoder
from runtime.errors import RequestError
from runtime.package import Precision
from runtime.sampling import SamplingOptions, choose_token, random_uniform

Ids: TypeAlias = NDArray[np.int64]

SEQUENCE_TOKENS = 512
SEQUENCES: Mapping[Precision, int] = {"int8": 8, "int4": 24}
"""What the demo model loses at 4 bits (KL over 102,400 other tokens, perplexity): 0.0107 and 1.06% with 16 sequences,
0.0104 and 0.91% with 24, 0.0102 and 0.83% with 32. With another seed perplexity differs by 0.1%, more than by the
number; KL does not. Time grows with the tokens."""

LONGEST_TOKEN = 32
"""Characters of a file for each token that is wanted: no text has as many."""

ROWS_TOGETHER = 8
"""Sequences that are written at a time: their keys and values take 1.5 GB at 774M, and more rows are hardly faster."""

SEED = 0
SAMPLING = SamplingOptions(top_k=0)
"""The model's whole distribution, rare tokens too. With the 40 most probable ones 0.0181 was lost, not 0.0145, by an
older recipe."""


def own_text(decoder: Decoder, sequences: int, progress: Callable[[int, int], None]) -> Ids:
    """What a model writes out of nothing, the same every time on one machine.

    Args:
        decoder: the model.
        sequences: B, rows.
        progress: called with the number of tokens that are written, and are to be.
    Returns:
        Token ids [B, T], each row from the end-of-text token on, and on beyond any other.
    """
    length = min(SEQUENCE_TOKENS, decoder.config.n_ctx)
    ids = np.full((sequences, length), decoder.config.eos_token_id, np.int64)
    written, total = 0, sequences * (length - 1)

    def count(tokens: int) -> None:
        nonlocal written
        written += tokens
        progress(written, total)

    for start in range(0, sequences, ROWS_TOGETHER):
        _write_rows(decoder, ids, range(start, min(start + ROWS_TOGETHER, sequences)), count)
    return ids


def _write_rows(decoder: Decoder, ids: Ids, rows: range, count: Callable[[int], None]) -> None:
    """Write some rows of ids [B, T], from their second token on."""
    length = ids.shape[1]
    decoding = decoder.start(batch=len(rows), capacity=length)
    for position in range(1, length):
        logits = decoding.decode_step(ids[rows, position - 1])
        for row, of_row in zip(rows, logits, strict=True):
            ids[row, position] = choose_token(of_row, SAMPLING, random_uniform(SEED, row, position))
        count(len(rows))


def text_of_file(path: Path, tokenizer: Tokenizer, config: GPT2Config, sequences: int) -> Ids:
    """The beginning of a text file.

    Returns:
        Token ids [B, T], cut as `own_text` cuts, B at most `sequences`.
    Raises:
        RequestError: the file cannot be read as text, or is too short for one row.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--calibration {path}: cannot be read as UTF-8 text ({error})") from error
    length = min(SEQUENCE_TOKENS, config.n_ctx)
    ids = np.array(tokenizer.encode(text[: sequences * length * LONGEST_TOKEN]).ids, np.int64)
    n_rows = min(sequences, len(ids) // length)
    if not n_rows:
        raise RequestError(f"--calibration {path}: {len(ids)} tokens, expected at least {length}; name a longer text")
    return ids[: n_rows * length].reshape(n_rows, length)
