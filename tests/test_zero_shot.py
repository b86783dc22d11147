"""examples/zero_shot: the paper's prompts, and that they run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.zero_shot.zero_shot import (
    PAIRS,
    answer,
    answer_prompt,
    first_sentences,
    main,
    summarize,
    summary_prompt,
    translate,
    translation_prompt,
)
from runtime import TextGenerator

ROOT = Path(__file__).parents[1]
ARTICLE = "The old king lived in a house by the sea. Every morning he went down to the water with his horse.\n"


@pytest.fixture(scope="module")
def demo(demo_int8: Path) -> TextGenerator:
    return TextGenerator.load(demo_int8)


def test_prompts_are_the_papers() -> None:
    assert summary_prompt("It rained.\n") == "It rained.\nTL;DR:"
    assert translation_prompt(["Yes. = Oui."], "No.") == "Yes. = Oui.\nNo. ="
    assert answer_prompt("It rained.", "", "Did it?") == "It rained.\n\nQ: Did it?\nA:"
    assert answer_prompt("It rained.", "Q: Where?\nA: Here.\n", "Did it?") == (
        "It rained.\n\nQ: Where?\nA: Here.\nQ: Did it?\nA:"
    )


@pytest.mark.parametrize(
    ("text", "count", "kept"),
    [
        (" One. Two!\nThree? Four.", 3, "One. Two! Three?"),
        ("It costs 3.50 here. More", 1, "It costs 3.50 here."),
        ("no end", 3, "no end"),
        ("", 1, ""),
    ],
)
def test_sentences_are_counted_to_their_ends(text: str, count: int, kept: str) -> None:
    assert first_sentences(text, count) == kept


def test_a_summary_is_three_sentences_at_most_and_the_seeds(demo: TextGenerator) -> None:
    summary = summarize(demo, ARTICLE, seed=1)
    assert summary
    assert first_sentences(summary, 3) == summary
    assert summarize(demo, ARTICLE, seed=1) == summary


def test_replies_are_greedy_and_one_line(demo: TextGenerator) -> None:
    assert translate(demo, "The sea is blue.", pairs=PAIRS) == translate(demo, "The sea is blue.")
    reply = answer(demo, ARTICLE, "Where did he live?", conversation="Q: Who?\nA: The king.")
    assert reply
    assert "\n" not in reply


def test_every_task_runs_from_the_command_line(
    demo_int8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    article, conversation = tmp_path / "article", tmp_path / "conversation"
    article.write_text(ARTICLE, encoding="utf-8")
    conversation.write_text("Q: Who?\nA: The king.\n", encoding="utf-8")
    for arguments in (
        ["summarize", article, "--seed", 1],
        ["translate", "The sea is blue.", "--pairs", conversation],
        ["answer", article, "Where?", "--conversation", conversation],
    ):
        assert main([str(demo_int8), *map(str, arguments)]) == 0
        printed = capsys.readouterr()
        assert (printed.err, printed.out.count("\n")) == ("", 1)


def test_an_article_that_does_not_fit_is_one_line(demo_int8: Path, tmp_path: Path) -> None:
    (tmp_path / "article").write_text(ARTICLE * 40, encoding="utf-8")
    command = [sys.executable, "-m", "examples.zero_shot.zero_shot", demo_int8, "summarize", tmp_path / "article"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "do not fit the model's context of 512" in done.stderr
