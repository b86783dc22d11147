"""The files that packages are judged on: plain text, LAMBADA's lines, the Children's Book Test's questions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import RequestError

BLANK = "XXXXX"
"""Stands for the missing word in the Children's Book Test."""

QUESTION_LINES = 21
"""20 sentences of context and the one with the blank."""

PLAIN_WRITING = (
    (r" ?''", '"'),
    (r' "', '"'),
    (r" '(?= |$)", "'"),
    (r" (n't|'s|'m|'d|'re|'ve|'ll)\b", r"\1"),
    (r"-LRB- ?", "("),
    (r" ?-RRB-", ")"),
    (r" ([!?,.;:])", r"\1"),
    (r"`` ?", '"'),
    (r"` ?", "'"),
)
"""What the Penn Treebank's tokens become, in this order: an opening quotation mark is always `` there."""


@dataclass(frozen=True, slots=True)
class LastWord:
    """A passage of LAMBADA: everything up to its last space, and the word behind it."""

    line: int
    context: str
    word: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question of the Children's Book Test, in plain writing."""

    line: int  # its first
    context: str
    sentence: str  # with BLANK in it
    answer: str
    candidates: tuple[str, ...]

    def filled(self, candidate: str) -> str:
        """Context and sentence as they read with this candidate."""
        return f"{self.context} {detokenize(self.sentence.replace(BLANK, candidate))}"


def read_text(path: Path) -> str:
    """Read a file of UTF-8, every byte of it.

    Raises:
        RequestError: it cannot be read, is empty, or is no UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror}); name a file of text") from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path}: byte {error.start:,} is no UTF-8 ({error.reason}); convert it to UTF-8 first"
        ) from error
    if not text:
        raise RequestError(f"{path}: is empty, expected text")
    return text


def read_lambada(path: Path) -> list[LastWord]:
    """Read a file of JSON lines, {"text": passage} each, as OpenAI published LAMBADA's test set.

    Raises:
        RequestError: as `read_text`; a line is no such object, or has no last word.
    """
    passages = []
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), start=1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise RequestError(f'{path}: line {number} is not {{"text": "..."}} ({error}); mend it') from error
        context, _, word = text.rpartition(" ") if isinstance(text, str) else ("", "", "")
        if not context or not word:
            raise RequestError(f"{path}: line {number} has no last word behind a space; mend it")
        passages.append(LastWord(number, context, word))
    return passages


def read_childrens_book(path: Path) -> list[Question]:
    """Read a file of the Children's Book Test, such as cbt_test_CN_2500ex.txt.

    A question is 21 numbered lines, then an empty one; the last is `21 sentence<TAB>answer<TAB><TAB>a|b|...`.

    Raises:
        RequestError: as `read_text`; a question is malformed, or there is none.
    Source: Hill et al., The Goldilocks Principle (2016), and the files of its data set.
    """
    questions = [_question(path, first, lines) for first, lines in _blocks(read_text(path))]
    if not questions:
        raise RequestError(f"{path}: holds no question, expected blocks of 21 numbered lines")
    return questions


def _blocks(text: str) -> Iterator[tuple[int, list[str]]]:
    """Runs of lines that are not empty, each with the number of its first."""
    block: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            block.append(line.rstrip("\r"))
        elif block:
            yield number - len(block), block
            block = []


def _question(path: Path, first: int, lines: list[str]) -> Question:
    numbered = [line.partition(" ") for line in lines]
    if [number for number, _, _ in numbered] != [str(number) for number in range(1, QUESTION_LINES + 1)]:
        raise RequestError(f"{path}: the question at line {first} is not 21 lines, numbered 1 to 21; mend it")
    *context, query = [sentence for _, _, sentence in numbered]
    sentence, answer, _, listed = [*query.split("\t"), "", "", "", ""][:4]
    candidates = tuple(listed.split("|"))
    if BLANK not in sentence or not answer or answer not in candidates:
        raise RequestError(
            f"{path}: line {first + len(lines) - 1} is not a sentence with {BLANK}, its answer and candidates a|b|c, "
            "the answer among them, separated by tabs; mend it"
        )
    return Question(first, detokenize(" ".join(context)), sentence, answer, candidates)


def detokenize(text: str) -> str:
    """Write text of the Penn Treebank's tokens as people do.

    The paper had such a step for this test too; its own rules are not published.
    """
    for pattern, plain in PLAIN_WRITING:
        text = re.sub(pattern, plain, text)
    return text
