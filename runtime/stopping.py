"""Where a text ends: end ids, stop strings, and how many new tokens there may or must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import RequestError
from .sampling import TokenIds, token_ids
from .tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingOptions:
    """When a text ends. Names and meaning are those of Hugging Face's GenerationConfig, where nothing else is said.

    Args:
        eos_token_id: one id, or several, each of which ends the text; none for a text that only its length ends. Kept
            as a tuple.
        stop_strings: one string, or several: the text ends before the first of them that is complete. (transformers
            keeps the string, and looks for it in the prompt too.) Kept as a tuple.
        max_new_tokens: the most that is written; None takes max_length, or else 128, or what the context has room for.
        min_new_tokens: no end id is chosen before this many.
        max_length: the same as max_new_tokens, the prompt counted in; max_new_tokens goes before it.
        min_length: the same as min_new_tokens, the prompt counted in.
    Raises:
        RequestError: an option is out of range; all such options are named.
    """

    eos_token_id: int | Sequence[int] = ()
    stop_strings: str | Sequence[str] = ()
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    max_length: int | None = None
    min_length: int = 0

    def __post_init__(self) -> None:
        faults = []
        for name in ("max_new_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                faults.append(f"{name} is {value!r}, expected a whole number above 0")
        for name in ("min_new_tokens", "min_length"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                faults.append(f"{name} is {value!r}, expected a whole number from 0 up")
        strings = (self.stop_strings,) if isinstance(self.stop_strings, str) else self.stop_strings
        if not isinstance(strings, Sequence) or not all(isinstance(text, str) and text for text in strings):
            faults.append(f"stop_strings is {self.stop_strings!r}, expected strings of at least one character")
        try:
            object.__setattr__(self, "eos_token_id", _end_ids(self.eos_token_id))
        except (TypeError, ValueError):
            faults.append(f"eos_token_id is {self.eos_token_id!r}, expected token ids")
        if faults:
            raise RequestError("stopping options: " + "; ".join(faults))
        object.__setattr__(self, "stop_strings", tuple(dict.fromkeys(strings)))

    @classmethod
    def from_generation_config(cls, values: Mapping[str, Any], *, eos_token_id: int) -> StoppingOptions:
        """The stopping part of a Hugging Face generation_config.json; an absent or null option keeps our default.

        Args:
            values: what the file holds.
            eos_token_id: the model's own end-of-text token, where the file names none.
        Raises:
            RequestError: an option is out of range.
        """
        given = {name: values[name] for name in cls.__slots__ if values.get(name) is not None}
        return cls(**{"eos_token_id": eos_token_id} | given)

    @property
    def eos_ids(self) -> TokenIds:
        """`eos_token_id` as what it is kept as."""
        return _end_ids(self.eos_token_id)

    def new_tokens(self, prompt_length: int, *, n_ctx: int) -> tuple[int, int]:
        """How many tokens are written at least and at most behind a prompt.

        Args:
            prompt_length: tokens of the prompt, 1 or more.
            n_ctx: tokens that the model's context holds.
        Returns:
            Fewest and most new tokens, 0 <= fewest <= most, 1 <= most.
        Raises:
            RequestError: they do not fit the context, or each other.
        """
        room = n_ctx - prompt_length
        most, asked = self.max_new_tokens, "max_new_tokens"
        if most is None and self.max_length is not None:
            most, asked = self.max_length - prompt_length, f"max_length {self.max_length}, so max_new_tokens"
        if most is None:
            most = max(1, min(DEFAULT_NEW_TOKENS, room))
        if most < 1:
            raise RequestError(
                f"max_length is {self.max_length}, and a prompt of {prompt_length} tokens leaves nothing of it; "
                "shorten the prompt or ask for max_new_tokens"
            )
        if most > room:
            advice = f" or ask for at most {room}" if room > 0 else ""
            raise RequestError(
                f"a prompt of {prompt_length} tokens and {asked} {most} do not fit the model's context of {n_ctx}; "
                f"shorten the prompt{advice}"
            )
        fewest = max(self.min_new_tokens, self.min_length - prompt_length)
        if fewest > most:
            raise RequestError(f"min_new_tokens is {fewest}, expected 0 to max_new_tokens, {most}")
        return fewest, most


def _end_ids(given: int | Sequence[int]) -> TokenIds:
    """One end id or several as a tuple, each once; TypeError or ValueError where they are no token ids."""
    several = [given] if isinstance(given, int) else list(given)
    return tuple(dict.fromkeys(token_ids(several))) if several else ()


class StopStrings:
    """Looks for stop strings in one text that comes in pieces, and keeps back what may be the beginning of one.

    What `push` and the last `finish` return, put together, is the text before the stop string that is complete first
    (of several that end together, before the longest), however the text was cut into pieces.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns:
            The text that is certain now, and whether it ended here: what is pushed then is of no account.
        """
        if not self._strings or self.stopped:
            return ("" if self.stopped else piece), self.stopped
        text = self._held + piece
        found = [(start + len(string), start) for string in self._strings if (start := text.find(string)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]], True
        certain = len(text) - self._uncertain(text)
        self._held = text[certain:]
        return text[:certain], False

    def finish(self) -> str:
        """The text that was kept back, once no more comes."""
        held, self._held = self._held, ""
        return held

    def _uncertain(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = min(len(text), max(map(len, self._strings)) - 1)
        return next(
            (size for size in range(longest, 0, -1) if any(s.startswith(text[-size:]) for s in self._strings)), 0
        )


class GrowingText:
    """The text of a row, token by token, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str]) -> None:
        self._decoder = tokenizer.stream()
        self._stops = StopStrings(stop_strings)
        self._certain: list[str] = []
        self._n_read = 0

    def push(self, token_id: int) -> bool:
        """Take the next token; true if a stop string is complete with it."""
        certain, stopped = self._stops.push(self._decoder.push(token_id))
        self._certain.append(certain)
        return stopped

    def finish(self) -> None:
        """No more tokens come."""
        if not self._stops.stopped:
            certain, stopped = self._stops.push(self._decoder.finish())
            self._certain.append(certain)
            if not stopped:
                self._certain.append(self._stops.finish())

    def read(self) -> str:
        """What has become certain since it was read last."""
        fresh = "".join(self._certain[self._n_read :])
        self._n_read = len(self._certain)
        return fresh

    @property
    def text(self) -> str:
        """All that is certain."""
        return "".join(self._certain)
