"""Text <-> token ids, and a streaming decoder that never emits half a character and never loses the tail.

Splitting and merging are done by the `tokenizers` library, imported when a tokenizer is loaded. Decoding is ours: a
token is a few bytes, and one UTF-8 decoder over these bytes serves whole and streamed text alike.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

Int64Array = npt.NDArray[np.int64]


def byte_alphabet() -> dict[str, int]:
    """The characters in which GPT-2's vocabulary files spell the 256 bytes.

    A printable byte of Latin-1 is the character of the same number; the 68 others, space and soft hyphen among them,
    are U+0100 onwards in order.

    Source: bytes_to_unicode in src/encoder.py of openai/gpt-2.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)).difference(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """A byte-level BPE tokenizer. Immutable: threads may share one.

    Ids run from 0 to n_vocab - 1. `special_tokens` maps the text of each special token, `<|endoftext|>` in GPT-2's
    vocabulary, to its id.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Take over a tokenizer of the `tokenizers` library; most callers want `Tokenizer.load`.

        Raises:
            TokenizerError: it is no byte-level BPE, or its ids are not 0, 1, 2 and so on.
        """
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # as ordinary text; `encode` looks for them itself where it is told to
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._token_bytes = _read_token_bytes(backend, {token_id: token.content for token_id, token in added.items()})
        self._absent_bytes = bytes(set(range(256)).difference(b"".join(t for t in self._token_bytes if len(t) == 1)))
        self.special_tokens: Mapping[str, int] = {t.content: token_id for token_id, t in added.items() if t.special}

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            TokenizerError: the file is missing, damaged or no byte-level BPE, or `tokenizers` is not installed.
        """
        try:
            import tokenizers  # noqa: PLC0415
        except ImportError as error:
            raise TokenizerError(
                "text needs the tokenizers library, which is not installed: pip install tokenizers"
            ) from error
        try:
            return cls(tokenizers.Tokenizer.from_buffer(path.read_bytes()))
        except OSError as error:
            raise TokenizerError(f"{path}: cannot be read: {error.strerror}; copy the package again") from error
        except ValueError as error:
            raise TokenizerError(f"{path}: is no tokenizer: {error}; copy the package again") from error
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error

    @property
    def n_vocab(self) -> int:
        return len(self._token_bytes)

    def encode(self, text: str, *, special_tokens: bool = False) -> Int64Array:
        """Turn text into token ids.

        Args:
            text: anything that UTF-8 can hold; the empty text gives no ids.
            special_tokens: False treats a literal `<|endoftext|>` as the ordinary text it is, as OpenAI's encoder does;
                True makes it the special token. Leave it False for text that a user wrote.
        Returns:
            [T] int64.
        Raises:
            TokenizerError: the text holds half a surrogate pair, or a byte that the vocabulary cannot spell.
        """
        if not special_tokens or not self.special_tokens:
            return np.array(self._encode_plain(text), dtype=np.int64)
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        pieces = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        # re.split with one group: text at even places, what was split at (here a special token) at odd ones.
        ids = [
            token_id
            for place, piece in enumerate(pieces)
            for token_id in ([self.special_tokens[piece]] if place % 2 else self._encode_plain(piece))
        ]
        return np.array(ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Turn token ids into text; bytes that are no UTF-8 become U+FFFD, special tokens their literal text.

        Raises:
            TokenizerError: an id is not in the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def stream(self) -> StreamingDecoder:
        """A decoder for ids that arrive one at a time."""
        return StreamingDecoder(self)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for: often no whole character.

        Raises:
            TokenizerError: the id is not in the vocabulary.
        """
        if not 0 <= index(token_id) < self.n_vocab:
            raise TokenizerError(f"token id {token_id} is not in the vocabulary, expected 0 to {self.n_vocab - 1}")
        return self._token_bytes[token_id]

    def _encode_plain(self, text: str) -> list[int]:
        self._refuse_unspeakable(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _refuse_unspeakable(self, text: str) -> None:
        try:
            spelled = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text: holds U+{ord(text[error.start]):04X}, half of a surrogate pair, which is no character; "
                "was the input read in another encoding than its own?"
            ) from error
        if self._absent_bytes and (absent := set(self._absent_bytes).intersection(spelled)):
            # The BPE would drop them without a word.
            listed = ", ".join(f"0x{byte:02X}" for byte in sorted(absent))
            raise TokenizerError(f"text: this vocabulary has no token for the bytes {listed}; leave them out")


class StreamingDecoder:
    """Decodes ids as they come: all that `push` and the last `finish` return is `Tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Take one id and return the characters that it completes, often none.

        Raises:
            TokenizerError: the id is not in the vocabulary.
        """
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Return what an unfinished character leaves: U+FFFD or nothing. The decoder is then as new."""
        tail = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return tail


def _read_token_bytes(backend: tokenizers.Tokenizer, added: Mapping[int, str]) -> list[bytes]:
    """List the bytes of every token by id; `added` are the tokens that are spelled as plain text."""
    if type(backend.model).__name__ != "BPE" or type(backend.decoder).__name__ != "ByteLevel":
        raise TokenizerError(f"is a {type(backend.model).__name__} tokenizer, expected a byte-level BPE")
    alphabet = byte_alphabet()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    by_id: dict[int, bytes] = {}
    for token, token_id in vocabulary.items():
        if token_id in added:
            by_id[token_id] = added[token_id].encode("utf-8")
            continue
        try:
            by_id[token_id] = bytes(map(alphabet.__getitem__, token))
        except KeyError as error:
            raise TokenizerError(f"token {token_id} {token!r} is not spelled in GPT-2's byte alphabet") from error
    if missing := set(range(len(vocabulary))).difference(by_id):
        raise TokenizerError(f"{len(vocabulary)} tokens, but none has id {min(missing)}; expected ids without gaps")
    return [by_id[token_id] for token_id in range(len(vocabulary))]
