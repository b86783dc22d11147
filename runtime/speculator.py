"""What a generator guesses by: nothing, the words of the text itself, or another package."""

from __future__ import annotations

from typing import Literal

from .decoder import Decoding
from .draft_pace import Pace
from .drafts import Draft, DraftPackage, PromptLookup
from .row import Row
from .speculation import Speculation

Source = Literal["nothing", "prompt", "package"]


class Speculator:
    """A draft package if there is one, and what was learned of how well guesses pay. Threads may share it."""

    def __init__(self, draft: DraftPackage | None = None) -> None:
        self._draft = draft
        self._paces: dict[tuple[Source, bool], Pace] = {}

    def begin(self, decoding: Decoding, slot: int, row: Row) -> Speculation | None:
        """Speculate for a row as its request asks; None if plain steps are all that it asks for.

        Args:
            decoding: holds the row's text but for its last token.
            slot: where the row stands in it.
            row: the text.
        """
        request, source = row.job.request, self._source(row)
        if source == "nothing" and not request.exact:
            return None
        pace = self._paces.setdefault((source, request.exact), Pace(exact=request.exact))
        return Speculation(decoding, slot, n_ctx=row.job.config.n_ctx, pace=pace, draft=self._guesser(source, row))

    def _source(self, row: Row) -> Source:
        if row.job.request.prompt_lookup:
            return "prompt"
        return "nothing" if self._draft is None else "package"

    def _guesser(self, source: Source, row: Row) -> Draft | None:
        if source == "prompt":
            return PromptLookup()
        if source == "nothing" or self._draft is None:
            return None
        return self._draft.for_text(row.choose, capacity=row.job.capacity)
