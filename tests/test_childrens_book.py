"""The Children's Book Test by hand: the choice follows from the runtime's own scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantization.childrens_book import choose_candidate, score_childrens_book
from quantization.datasets import Question, read_childrens_book
from quantization.scored_package import ScoredPackage

STORY = (
    "The old king lived in a house by the sea .",
    "He had a daughter and a white horse .",
    "Every morning the daughter went down to the water .",
    "The horse went with her .",
)
QUERIES = (
    "He looked at the XXXXX , and he laughed .\tsea\t\thouse|horse|daughter|morning|sea|water|king",
    "XXXXX was old .\tHe\t\tHe|She|The|Every|With",
    "`` Where is my XXXXX ? '' said the king .\tdaughter\t\tdaughter|daughters|sea|had",
)


@pytest.fixture(scope="module")
def demo(demo_fp32: Path) -> ScoredPackage:
    return ScoredPackage(demo_fp32)


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    """Three questions in the data set's format; there is no other file of it here."""
    context = "".join(f"{number} {STORY[number % len(STORY)]}\n" for number in range(1, 21))
    path = tmp_path / "cbt.txt"
    path.write_text("\n".join(f"{context}21 {query}\n" for query in QUERIES), encoding="utf-8")
    return read_childrens_book(path)


def most_probable(package: ScoredPackage, question: Question) -> str:
    """By the probability of everything, which differs from the rest of the sentence's by the same for all."""
    encode = package.generator.tokenizer.encode
    totals = [package.generator.score(encode(question.filled(word))).sum() for word in question.candidates]
    return question.candidates[int(np.argmax(totals))]


def test_the_choice_makes_the_whole_most_probable(demo: ScoredPackage, questions: list[Question]) -> None:
    choices = [choose_candidate(demo, question) for question in questions]
    assert choices == [most_probable(demo, question) for question in questions]
    assert len(set(choices)) > 1


def test_accuracy_is_the_share_of_right_choices(demo: ScoredPackage, questions: list[Question]) -> None:
    right = [choose_candidate(demo, question) == question.answer for question in questions]
    told: list[int] = []
    quality = score_childrens_book(demo, questions, progress=lambda _what, done, _total: told.append(done))
    assert (quality.questions, quality.accuracy) == (3, np.mean(right))
    assert told == [1, 2, 3]


def test_a_candidate_that_begins_another_and_one_that_comes_twice_are_told_apart(demo: ScoredPackage) -> None:
    question = Question(1, "The king rode out.", "He took his XXXXX", "horse", ("horses", "horse", "horse"))
    assert choose_candidate(demo, question) == most_probable(demo, question)


def test_a_context_that_is_too_long_keeps_its_end(demo: ScoredPackage, questions: list[Question]) -> None:
    first = questions[0]
    long = Question(1, " ".join([first.context] * 4), first.sentence, first.answer, first.candidates)
    assert len(demo.generator.tokenizer.encode(long.context)) > demo.generator.config.n_ctx
    assert choose_candidate(demo, long) in first.candidates
