"""What is run: prompts of a known length, or given ones, and how many tokens are written behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import RequestError
from ..tokenizer import Tokenizer

POOL = 512
"""Tokens that random prompts are made of: words that the tokenizer gives back as the one token that they came from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One case of a sweep.

    Args:
        prompt_tokens: length of the random prompts; None where `prompts` are given.
        prompts: taken in turn; each run goes on where the last one stopped.
        new_tokens: written behind each prompt, whatever they are: an end-of-text is never chosen.
        batch: prompts that run together.
    """

    prompt_tokens: int | None = None
    prompts: tuple[str, ...] = ()
    new_tokens: int
    batch: int

    def __str__(self) -> str:
        prompt = f"{len(self.prompts)} prompts" if self.prompt_tokens is None else f"prompt {self.prompt_tokens}"
        return f"{prompt}, {self.new_tokens} new tokens, batch {self.batch}"

    def texts(self, tokenizer: Tokenizer, run: int) -> list[str]:
        """The prompts of one run, `batch` of them; another run has others, as some caches keep prompts.

        Raises:
            RequestError: no text of this many tokens can be made with this tokenizer.
        """
        first = run * self.batch
        if self.prompt_tokens is None:
            return [self.prompts[(first + row) % len(self.prompts)] for row in range(self.batch)]
        return [random_text(tokenizer, self.prompt_tokens, seed=first + row) for row in range(self.batch)]


def random_text(tokenizer: Tokenizer, n_tokens: int, *, seed: int) -> str:
    """A text of random words that is exactly `n_tokens` tokens long.

    Raises:
        RequestError: this tokenizer's words do not keep their tokens when they stand together.
    """
    rng = np.random.default_rng(seed)
    words = [token_id for token_id in range(tokenizer.n_vocab) if _is_word(tokenizer.token_bytes(token_id))]
    if not words:  # a vocabulary of bytes
        words = [i for i in range(tokenizer.n_vocab) if tokenizer.token_bytes(i).isalpha()]
    drawn = rng.permutation(words)[:POOL].tolist()
    pool = [token_id for token_id in drawn if tokenizer.encode(tokenizer.decode([token_id])).tolist() == [token_id]]
    if pool:
        ids = rng.choice(pool, n_tokens)
        text = tokenizer.decode(ids.tolist())
        if len(tokenizer.encode(text)) == n_tokens:
            return text
    raise RequestError(
        f"no text of exactly {n_tokens} tokens can be made with this package's tokenizer; give prompts of your own "
        "with --prompts FILE"
    )


def _is_word(token: bytes) -> bool:
    """A space and letters of ASCII: such tokens stay what they are, whatever stands before and after them."""
    return token[:1] == b" " and token[1:].isalpha()
