"""The tasks of OpenAI's paper that are asked by prompt alone: summaries, translations, answers.

    python examples/zero_shot/zero_shot.py packages/774M-int8 summarize article.txt
    python examples/zero_shot/zero_shot.py packages/774M-int8 translate "The cat sat on the mat." --pairs pairs.txt
    python examples/zero_shot/zero_shot.py packages/774M-int8 answer document.txt "Who sat on the mat?"

Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019), sections 3.5 to 3.8.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime import SamplingOptions, TextGenerator
from runtime.command_line import CommandLineParser, run_command

SUMMARY_TOKENS, SUMMARY_SENTENCES = 100, 3
LONGEST_REPLY = 64
"""Tokens of a translation or an answer; the paper gives no number."""

PAIRS = ("Good morning. = Bonjour.", "Where is the station? = Où est la gare ?", "I like this book. = J'aime ce livre.")


def summary_prompt(article: str) -> str:
    return f"{article.strip()}\nTL;DR:"


def translation_prompt(pairs: Sequence[str], sentence: str) -> str:
    """Pairs are `english sentence = french sentence`."""
    return "\n".join([*pairs, f"{sentence.strip()} ="])


def answer_prompt(document: str, conversation: str, question: str) -> str:
    """The conversation so far is lines of `Q: question` and `A: answer`, or empty."""
    turns = [conversation.strip()] if conversation.strip() else []
    return "\n".join([document.strip(), "", *turns, f"Q: {question.strip()}", "A:"])


def first_sentences(text: str, count: int) -> str:
    """The text up to the end of its `count`-th sentence, on one line."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    return " ".join(" ".join(sentences[:count]).split())


def summarize(generator: TextGenerator, article: str, *, seed: int | None = None) -> str:
    """Three sentences, sampled among the two most probable tokens each time."""
    result = generator.generate(
        summary_prompt(article), max_new_tokens=SUMMARY_TOKENS, sampling=SamplingOptions(top_k=2, seed=seed)
    )
    return first_sentences(result.text, SUMMARY_SENTENCES)


def translate(generator: TextGenerator, sentence: str, *, pairs: Sequence[str] = PAIRS) -> str:
    """One sentence, greedily."""
    return first_sentences(_continued(generator, translation_prompt(pairs, sentence)), 1)


def answer(generator: TextGenerator, document: str, question: str, *, conversation: str = "") -> str:
    """One line, greedily."""
    return _continued(generator, answer_prompt(document, conversation, question))


def _continued(generator: TextGenerator, prompt: str) -> str:
    """The most probable continuation, up to the end of its line."""
    result = generator.generate(prompt, max_new_tokens=LONGEST_REPLY, sampling=SamplingOptions.greedy())
    return result.text.strip().partition("\n")[0]


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLineParser(description="Summaries, translations and answers by prompt alone.")
    parser.add_argument("package", help="folder that export.convert wrote")
    tasks = parser.add_subparsers(dest="task", required=True)
    summary = tasks.add_parser("summarize")
    summary.add_argument("article", type=Path)
    summary.add_argument("--seed", type=int)
    translation = tasks.add_parser("translate")
    translation.add_argument("sentence")
    translation.add_argument("--pairs", type=Path, help="lines of: english sentence = french sentence")
    reply = tasks.add_parser("answer")
    reply.add_argument("document", type=Path)
    reply.add_argument("question")
    reply.add_argument("--conversation", type=Path, help="lines of: Q: question, A: answer")
    return parser.parse_args(argv)


def _run(options: argparse.Namespace) -> int:
    generator = TextGenerator.load(options.package)
    if options.task == "summarize":
        print(summarize(generator, _read(options.article), seed=options.seed))
    elif options.task == "translate":
        pairs = _read(options.pairs).strip().splitlines() if options.pairs else PAIRS
        print(translate(generator, options.sentence, pairs=pairs))
    else:
        conversation = _read(options.conversation) if options.conversation else ""
        print(answer(generator, _read(options.document), options.question, conversation=conversation))
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
