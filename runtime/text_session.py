"""TextSession: one text that grows: append, generate, rewind, fork, save and go on from there.

A session runs each token once, and its last one only when the next is asked for. A token's keys and values are a
function of the tokens before it and of how it was run: alone, if the model chose the next token while it was the last
and so had been the one before; else in a piece with its neighbours, all of whose cuts give the same bits (see
`decoder.pieces`). Which it was can be told from which tokens were generated. So the cache is no state, but a memory of
work: however a session came to its tokens, by rewinding, in a fork or in another process, it goes on in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError
from .kv_cache import Buffer
from .prefix_cache import PrefixCache, prefill
from .request import Prompt, Request, Sample, SessionOptions
from .row import Row, as_ids, prepare
from .sampling import UINT64_MASK, SamplingOptions, fresh_seed
from .saved_session import SavedSession, read_session, write_session
from .stopping import DEFAULT_NEW_TOKENS
from .text_generator import TextGenerator

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TextSession:
    """A text under way. One thread at a time may use it; any number of sessions may share a generator.

    What comes next is a function of `ids`, of which of them were generated, and of `sampling` and `sample`: these may
    be set anew at any time. The random number of a token depends on (seed, sample, position) alone.
    """

    def __init__(
        self,
        generator: TextGenerator,
        *,
        sampling: SamplingOptions | None = None,
        sample: int = 0,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        """Begin with no tokens.

        Args:
            generator: the package.
            sampling: how tokens are chosen; None takes the package's own defaults. A seed is drawn if it has none.
            sample: 0 to 2**64 - 1; sessions of one seed and several samples go on differently.
            prefix_cache: of the same generator: what it remembers of a first text is not run again. None takes the one
                that the generator was loaded with, if any.
        Raises:
            RequestError: sample is out of range, or the prefix cache is another generator's.
        """
        if prefix_cache is not None and prefix_cache.decoder is not generator.decoder:
            raise RequestError("the prefix cache holds another generator's keys and values; make one of this generator")
        self._generator = generator
        self._prefix_cache = prefix_cache or generator.prefix_cache
        self.sampling = sampling or generator.default_sampling
        self.sample = sample
        self._ids: list[int] = []
        self._generated: list[bool] = []  # by token: chosen by the model
        self._decoding = generator.decoder.start(batch=1, capacity=1)

    @property
    def sampling(self) -> SamplingOptions:
        """How the next tokens are chosen, with the seed."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: SamplingOptions) -> None:
        self._sampling = replace(sampling, seed=fresh_seed()) if sampling.seed is None else sampling

    @property
    def sample(self) -> int:
        """Which of the seed's samples this is."""
        return self._sample

    @sample.setter
    def sample(self, sample: int) -> None:
        if type(sample) is not int or not 0 <= sample <= UINT64_MASK:
            raise RequestError(f"sample is {sample!r}, expected a whole number from 0 to 2**64 - 1")
        self._sample = sample

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens. An end-of-text that the model chose is none of them; what is appended follows the text itself."""
        return tuple(self._ids)

    @property
    def text(self) -> str:
        return self._generator.tokenizer.decode(self._ids)

    @property
    def tokens_left(self) -> int:
        """How many more tokens the context holds."""
        return self._generator.config.n_ctx - len(self._ids)

    def append(self, prompt: Prompt) -> None:
        """Append text or token ids, to be run when the next token is asked for.

        Text is encoded by itself: cut elsewhere, the same text may be other tokens.

        Raises:
            RequestError: it does not fit the context, or ids are out of range; the session is as it was.
            TokenizerError: it is no text.
        """
        ids = self._generator.tokenizer.encode(prompt) if isinstance(prompt, str) else as_ids(prompt)
        if not ids.size:
            return
        if ids.size > self.tokens_left:
            raise RequestError(
                f"{ids.size} tokens to append to {len(self._ids)} do not fit the model's context of "
                f"{self._generator.config.n_ctx}; append at most {self.tokens_left}, or rewind the session"
            )
        self._generator.decoder.check_ids(ids, past=len(self._ids))
        self._forget(beyond=self._known)  # where the model chose an end, it has run the last token: alone
        self._ids += ids.tolist()
        self._generated += [False] * len(ids)

    def rewind(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens.

        Raises:
            RequestError: the session has no such number of tokens.
        """
        if type(tokens) is not int or not 0 <= tokens <= len(self._ids):
            raise RequestError(f"cannot rewind to {tokens!r} tokens, expected 0 to {len(self._ids)}, what there is")
        del self._ids[tokens:], self._generated[tokens:]
        self._forget(beyond=self._known)

    def fork(self, *, sample: int | None = None) -> TextSession:
        """Another session with the same tokens, for the price of a copy of their keys and values.

        Args:
            sample: of the fork; None keeps the session's, and both go on alike.
        Raises:
            RequestError: sample is out of range.
            MachineError: the memory cannot be had.
        """
        session = TextSession(
            self._generator,
            sampling=self.sampling,
            sample=self.sample if sample is None else sample,
            prefix_cache=self._prefix_cache,
        )
        session._take(self._ids, self._generated, self._past)
        return session

    def generate(self, **options: Unpack[SessionOptions]) -> Sample:
        """Go on, and keep what was written. A session without tokens begins with the end-of-text token.

        A character that the last token leaves unfinished is U+FFFD in the sample, and whole in `text` once it is. Of a
        text that a stop string ended, the session holds the stop string too, as the sample's ids do.

        Args:
            options: `SessionOptions`, which mean what they mean in a `Request`. max_new_tokens None takes 128, or what
                the context has room for.
        Returns:
            The continuation; its `stats.prompt_tokens` are the tokens that were run before the first new one.
        Raises:
            RequestError: the new tokens do not fit the context, a value is out of range, or a session does not know
                the option.
            MachineError: memory ran out, or the device computes nonsense.
        """
        to_run = max(1, len(self._ids) - self._known)
        row = self._row(options)
        for _ in self._chosen(row):
            pass
        sample = row.result()
        return replace(sample, stats=replace(sample.stats, prompt_tokens=to_run))

    def stream(self, **options: Unpack[SessionOptions]) -> Iterator[str]:
        """As `generate`, but yield the text as soon as it is certain.

        What was chosen is kept, whether the text is read to its end or not.

        Raises:
            RequestError: at the call, as `generate`; while it is read, if the session was changed since.
        """
        return self._stream(self._row(options, follows_text=True))

    def save(self, path: str | Path) -> None:
        """Write the session to a file, which `restore` reads; one that stands there is replaced when all is written.

        Raises:
            RequestError: it is larger than a session file can be.
            MachineError: it cannot be written.
        """
        saved = SavedSession(
            ids=np.array(self._ids, np.int64),
            generated=np.array(self._generated, np.bool_),
            past=self._past,
            sampling=self.sampling,
            sample=self.sample,
        )
        write_session(Path(path), saved, self._generator.package.manifest)

    @classmethod
    def restore(
        cls,
        generator: TextGenerator,
        path: str | Path,
        *,
        reencode: bool = False,
        prefix_cache: PrefixCache | None = None,
    ) -> TextSession:
        """Read a session that `save` wrote; it goes on as the saved one would have.

        Args:
            generator: the package that it was saved with.
            path: the file.
            reencode: take a session of another package with the same tokenizer too, and run its tokens again.
            prefix_cache: as when a session begins.
        Raises:
            SessionError: the file is missing, damaged, no session, or belongs to another package.
            MachineError: the memory cannot be had.
        """
        saved = read_session(Path(path), generator.package.manifest, reencode=reencode)
        session = cls(generator, sampling=saved.sampling, sample=saved.sample, prefix_cache=prefix_cache)
        session._take(saved.ids.tolist(), saved.generated.tolist(), saved.past)
        return session

    @property
    def _known(self) -> int:
        """Tokens whose keys and values are there and need not be run again: never the last, whose logits are wanted."""
        return max(0, min(int(self._decoding.cache.lengths[0]), len(self._ids) - 1))

    @property
    def _past(self) -> Buffer:
        """[2L, H, P, D], a view."""
        return self._decoding.cache.row(0)[:, :, : self._known]

    def _forget(self, *, beyond: int) -> None:
        self._decoding.cache.truncate(0, beyond)

    def _take(self, ids: Sequence[int], generated: Sequence[bool], past: Buffer) -> None:
        self._ids, self._generated = list(ids), list(generated)
        capacity = min(past.shape[2] + DEFAULT_NEW_TOKENS, self._generator.config.n_ctx)
        self._decoding = self._generator.decoder.start(batch=1, capacity=capacity)
        self._decoding.insert(0, past)

    def _row(self, options: SessionOptions, *, follows_text: bool = False) -> Row:
        """Check a request; the row chooses its tokens."""
        if unknown := sorted(options.keys() - SessionOptions.__annotations__.keys()):
            known = ", ".join(SessionOptions.__annotations__)
            raise RequestError(f"a session is asked for no {', '.join(unknown)}; expected some of {known}")
        config, most = self._generator.config, options.get("max_new_tokens")
        room = min(self.tokens_left, config.n_ctx - 1)
        if not room or (type(most) is int and most > room):
            advice = f"ask for at most {room}, or rewind it" if room else "rewind it"
            raise RequestError(
                f"a session of {len(self._ids)} tokens and max_new_tokens {most or 1} do not fit the model's "
                f"context of {config.n_ctx}; {advice}"
            )
        job = prepare(Request(self._ids, sampling=self.sampling, **options), self._generator.defaults)
        job.follows_text |= follows_text
        if not self._ids:
            self.append(job.prompt)  # the end-of-text token
        return Row(job, self.sample)

    def _chosen(self, row: Row) -> Iterator[None]:
        """Choose a token each time, and keep it unless it ends the text."""
        while not row.ended and not row.interrupted():
            if self._ids != row.ids:
                raise RequestError("the session was changed while a stream of it was read; begin a new stream")
            logits = self._run(row)
            if logits is None:
                return
            row.advance(logits)
            if row.error is not None:
                raise row.error
            if not row.ended_by_id:
                self._ids.append(row.ids[-1])
                self._generated.append(True)
                yield

    def _run(self, row: Row) -> NDArray[np.float32] | None:
        """Run what was not run yet; logits [V] after the last token, valid until the next run, None if interrupted."""
        start = self._known
        if start == len(self._ids) - 1 > 0 and not self._generated[-1]:
            start -= 1  # a token that was given is run in a piece of two at least: see above
        self._forget(beyond=start)
        ids = np.array(self._ids[start:], np.int64)
        prefixes = None if start else self._prefix_cache
        return prefill(self._decoding, 0, ids, prefixes=prefixes, interrupted=row.interrupted)

    def _stream(self, row: Row) -> Iterator[str]:
        assert row.text is not None, "the job follows it"
        for _ in self._chosen(row):
            if fresh := row.text.read():
                yield fresh
        row.text.finish()
        if fresh := row.text.read():
            yield fresh
