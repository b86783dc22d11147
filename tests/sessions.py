"""Sessions that tests begin, and what would come next in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import SamplingOptions, TextGenerator, TextSession

PROMPT = "“I do not know,” said he; “it"
SEED = SamplingOptions(seed=7)
N_NEW = 24

IDS = np.random.default_rng(3).integers(0, 8191, 400).tolist()


class SetAt:
    """A cancellation that is set from the nth look on."""

    def __init__(self, look: int) -> None:
        self._left = look

    def is_set(self) -> bool:
        self._left -= 1
        return self._left <= 0


def begun(generator: TextGenerator, prompt: str | Sequence[int] = PROMPT, **options: Any) -> TextSession:
    session = TextSession(generator, **({"sampling": SEED} | options))
    session.append(prompt)
    return session


def next_logits(session: TextSession) -> NDArray[np.float32]:
    """What the session's next token is chosen from, as a fork tells: the session itself stays as it is."""
    seen: list[NDArray[np.float32]] = []

    def keep(_ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(logits.copy())
        return logits

    session.fork().generate(max_new_tokens=1, logits_processor=keep)
    return seen[0]


def replayed(session: TextSession) -> TextSession:
    """A new session with the same tokens: what was given is appended again, what was generated is generated again."""
    fresh = TextSession(session._generator, sampling=session.sampling, sample=session.sample)
    for place, token_id in enumerate(session.ids):
        if session._generated[place]:
            fresh.generate(max_new_tokens=1, min_new_tokens=1)
        else:
            fresh.append([token_id])
    return fresh
