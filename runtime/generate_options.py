"""The options of `python -m runtime.generate`, and what they ask of a generator."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from .command_line import CommandLineParser, add_device
from .prompt_file import DRAWN, with_options
from .request import Overflow, RequestOptions
from .sampling import SamplingOptions
from .stopping import DEFAULT_NEW_TOKENS
from .text_generator import DEFAULT_BATCH_SIZE
from .truncation import Rule

EDITS = ("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size")
"""Options that change the logits, sampled from or not."""

REQUEST = (
    *("max_new_tokens", "min_new_tokens", "stop_strings", "num_return_sequences", "top_logprobs", "num_beams"),
    *("length_penalty", "prompt_lookup", "exact", "overflow", "deadline_ms"),
)
"""Options that are fields of `Request` by the same name."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; bad usage ends the program."""
    parser = CommandLineParser(
        prog="python -m runtime.generate",
        description="Write text with a package: continue PROMPT, or out of nothing without one.",
    )
    parser.add_argument("package", help="folder that export.convert wrote")
    parser.add_argument("prompt", nargs="?", default="", help="text to continue; - reads it from standard input")
    _add_length(parser.add_argument_group("length"))
    _add_choice(parser.add_argument_group("choice of tokens", "default: the package's own"))
    _add_many(parser.add_argument_group("many prompts"))
    _add_guesses(parser.add_argument_group("guessed tokens", "several are checked in one run: see runtime.speculation"))
    _add_machine(parser.add_argument_group("machine"))
    parser.add_argument("--interactive", action="store_true", help="read prompts line by line until end of input")
    parser.add_argument("--stats", action="store_true", help="times, seed and where it ran, on stderr")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    options = parser.parse_args(argv)
    _refuse_combinations(parser, options)
    return options


def sampling_options(options: argparse.Namespace, default: SamplingOptions) -> SamplingOptions:
    """How tokens are chosen.

    Raises:
        RequestError: a value is out of range.
    """
    base = SamplingOptions.greedy() if options.greedy else default
    edits = _given(options, EDITS)
    return with_options(with_options(base, {"do_sample": base.do_sample, **edits}), _given(options, DRAWN))


def request_options(options: argparse.Namespace, sampling: SamplingOptions) -> RequestOptions:
    """What each request asks for."""
    return cast("RequestOptions", {**_given(options, REQUEST), "sampling": sampling})


def _given(options: argparse.Namespace, names: Sequence[str]) -> Mapping[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _add_length(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-new-tokens", type=int, metavar="N", help=f"default {DEFAULT_NEW_TOKENS}, room permitting")
    group.add_argument("--min-new-tokens", type=int, metavar="N", help="no end of text before so many")
    group.add_argument(
        "--stop", dest="stop_strings", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    group.add_argument("--overflow", choices=get_args(Overflow), help="text longer than the context; default error")
    group.add_argument("--deadline-ms", type=float, metavar="MS", help="end each text when so much time is over")


def _add_choice(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--greedy", action="store_true", help="the most probable token each time")
    group.add_argument("--temperature", type=float, metavar="T", help="1 leaves the probabilities as they are")
    group.add_argument("--top-k", type=int, metavar="K", help="0 is off")
    group.add_argument("--top-p", type=float, metavar="P", help="1 is off")
    group.add_argument("--min-p", type=float, metavar="P", help="0 is off")
    group.add_argument("--typical-p", type=float, metavar="P", help="1 is off")
    group.add_argument("--rule", choices=get_args(Rule), help="whose top_p: openai is GPT-2's own code")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="1 is off")
    group.add_argument("--presence-penalty", type=float, metavar="R", help="0 is off")
    group.add_argument("--frequency-penalty", type=float, metavar="R", help="0 is off")
    group.add_argument("--no-repeat-ngram-size", type=int, metavar="N", help="0 is off")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    group.add_argument("--num-return-sequences", type=int, metavar="N", help="samples of the same prompt")
    group.add_argument(
        "--num-beams", type=int, metavar="N", help="search the most probable text instead; with --greedy"
    )
    group.add_argument("--length-penalty", type=float, metavar="R", help="of beams; default 1")
    group.add_argument(
        "--top-logprobs", type=int, metavar="N", help="with --json: log-probabilities, and the N largest"
    )


def _add_many(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="a prompt a line, or a JSON object with a prompt and its options; - is standard input; one JSON object a "
        "line comes out",
    )
    group.add_argument("--batch", type=int, metavar="N", help=f"run together (default {DEFAULT_BATCH_SIZE})")
    group.add_argument("--as-ready", action="store_true", help="print each as it ends, not in order")
    group.add_argument(
        "--prefix-cache-bytes", type=int, default=0, metavar="N", help="memory for beginnings that prompts share"
    )


def _add_guesses(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt-lookup", action="store_true", default=None, help="by what followed the same words before"
    )
    group.add_argument("--draft", metavar="PACKAGE", help="by a smaller package with the same tokenizer")
    group.add_argument(
        "--exact", action="store_true", default=None, help="the same text to the last bit, guesses or none"
    )


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add_device(group)
    group.add_argument("--threads", type=int, metavar="N", help="default: the processors this process may use")
    group.add_argument(
        "--prepacked-dir", metavar="DIR", help="keep the weights there as this processor multiplies them: loads faster"
    )


def _refuse_combinations(parser: CommandLineParser, options: argparse.Namespace) -> None:
    if options.greedy and (given := _given(options, DRAWN)):
        parser.error(f"--greedy takes no {', '.join('--' + name.replace('_', '-') for name in given)}")
    if options.interactive and (options.prompt or options.json):
        parser.error("--interactive takes no PROMPT and no --json")
    if options.prompts is None and (options.batch is not None or options.as_ready):
        parser.error("--batch and --as-ready are for --prompts FILE")
    if options.prompts is not None and (options.prompt or options.interactive or options.json or options.stats):
        parser.error("--prompts takes no PROMPT, --interactive, --json or --stats: its lines are JSON, with statistics")
    if options.num_beams not in (None, 1) and (options.draft or options.prefix_cache_bytes):
        parser.error("--draft and --prefix-cache-bytes do nothing for --num-beams; leave them out")
    if options.prompts is not None and (options.draft or options.prompt_lookup or options.exact):
        parser.error("--draft, --prompt-lookup and --exact are for one PROMPT at a time, not for --prompts")
    if options.top_logprobs is not None and not (options.json or options.prompts):
        parser.error("--top-logprobs is for --json and --prompts")
