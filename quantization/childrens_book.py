"""The Children's Book Test: which of ten words stood in the blank?

The package chooses the candidate that, with the rest of the sentence, is the most probable one after all that stands
before the blank: the way of OpenAI's paper, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .continuations import score_continuations
from .datasets import Question
from .scored_package import Int64Array, Progress, ScoredPackage
from .standard_error import clustered_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildrensBookQuality:
    """The figures of one package; the accuracy is a share; its standard error takes questions as independent."""

    questions: int
    accuracy: float
    accuracy_standard_error: float | None


def score_childrens_book(
    package: ScoredPackage, questions: Sequence[Question], *, progress: Progress
) -> ChildrensBookQuality:
    """Have a package fill in each question's blank; a context that is too long keeps its end.

    Args:
        package: the model.
        questions: at least one.
        progress: called after each.
    Raises:
        TokenizerError: a question has a byte that the vocabulary cannot spell.
        RequestError, PackageError: as `score_continuations`.
    """
    right = []
    for number, question in enumerate(questions, start=1):
        right.append(choose_candidate(package, question) == question.answer)
        progress("questions", number, len(questions))
    accuracy = clustered_mean(right, np.ones(len(right), np.int64))
    return ChildrensBookQuality(
        questions=len(questions), accuracy=accuracy.mean, accuracy_standard_error=accuracy.standard_error
    )


def choose_candidate(package: ScoredPackage, question: Question) -> str:
    """The most probable candidate; arguments and errors as `score_childrens_book`."""
    encode = package.generator.tokenizer.encode
    filled = [encode(question.filled(candidate)) for candidate in question.candidates]
    shared = _shared_length(filled)
    scored = score_continuations(
        package, filled[0][:shared], [ids[shared:] for ids in filled], where=f"the question at line {question.line}"
    )
    best = int(np.argmax([continuation.log_p.sum() for continuation in scored]))
    return question.candidates[best]


def _shared_length(sequences: Sequence[Int64Array]) -> int:
    """How many first tokens all have in common, at least one of each left over.

    What they share is equally probable with every candidate, and is run once.
    """
    shortest = min(map(len, sequences)) - 1
    first = np.stack([ids[:shortest] for ids in sequences])  # [candidates, shortest]
    differs = (first != first[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest
