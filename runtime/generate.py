"""Write text with a package, from the command line.

python -m runtime.generate PACKAGE "Once upon a time"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from .command_line import CommandLineParser, add_device, print_json, run_command
from .errors import RequestError, TokenizerError
from .sampling import SamplingOptions
from .text_generator import DEFAULT_NEW_TOKENS, Generation, TextGenerator


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    return run_command(lambda: _generate(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLineParser(
        prog="python -m runtime.generate",
        description="Write text with a package: continue PROMPT, or out of nothing without one.",
    )
    parser.add_argument("package", help="folder that export.convert wrote")
    parser.add_argument("prompt", nargs="?", default="", help="text to continue; - reads it from standard input")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"default {DEFAULT_NEW_TOKENS}, room permitting"
    )
    parser.add_argument("--greedy", action="store_true", help="the most probable token each time")
    parser.add_argument("--temperature", type=float, metavar="T", help="default: the package's, as for the next two")
    parser.add_argument("--top-k", type=int, metavar="K", help="0 is off")
    parser.add_argument("--top-p", type=float, metavar="P", help="1 is off")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    parser.add_argument("--num-return-sequences", type=int, default=1, metavar="N", help="samples of the same prompt")
    parser.add_argument("--interactive", action="store_true", help="read prompts line by line until end of input")
    add_device(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="default: the processors this process may use")
    parser.add_argument(
        "--prepacked-dir", metavar="DIR", help="keep the weights there as this processor multiplies them: loads faster"
    )
    parser.add_argument("--stats", action="store_true", help="times, seed and where it ran, on stderr")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    options = parser.parse_args(argv)
    if options.greedy and any(
        value is not None for value in (options.temperature, options.top_k, options.top_p, options.seed)
    ):
        parser.error("--greedy takes no --temperature, --top-k, --top-p or --seed")
    if options.interactive and (options.prompt or options.json):
        parser.error("--interactive takes no PROMPT and no --json")
    return options


def _generate(options: argparse.Namespace) -> int:
    generator = TextGenerator.load(
        options.package, device=options.device, threads=options.threads, prepacked_dir=options.prepacked_dir
    )
    sampling = _sampling(options, generator.default_sampling)
    if options.interactive:
        for prompt in _typed_prompts():
            try:
                _write(generator, prompt, sampling, options)
            except RequestError as error:  # too long, say: the next line may be shorter
                print(f"error: {error}", file=sys.stderr)
    else:
        prompt = _text(sys.stdin.buffer.read()) if options.prompt == "-" else options.prompt
        _write(generator, prompt, sampling, options)
    return 0


def _sampling(options: argparse.Namespace, default: SamplingOptions) -> SamplingOptions:
    if options.greedy:
        return SamplingOptions.greedy()
    given = {
        name: value
        for name in ("temperature", "top_k", "top_p", "seed")
        if (value := getattr(options, name)) is not None
    }
    return replace(default, **given, do_sample=default.do_sample or bool(given))


def _write(generator: TextGenerator, prompt: str, sampling: SamplingOptions, options: argparse.Namespace) -> None:
    """Generate and print; a lone sample is printed as it is written."""
    if options.num_return_sequences == 1 and not options.json and not options.stats:
        for text in generator.stream(prompt, max_new_tokens=options.max_new_tokens, sampling=sampling):
            print(text, end="", flush=True)
        print()
        return
    result = generator.generate(
        prompt,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        num_return_sequences=options.num_return_sequences,
    )
    if options.json:
        print_json(asdict(result) | {"receipt": generator.decoder.receipt.to_dict()})
    else:
        for number, sample in enumerate(result.samples, start=1):
            if len(result.samples) > 1:
                print(f"{'=' * 40} SAMPLE {number} {'=' * 40}")
            print(sample.text)
    if options.stats:
        _print_stats(result)
        print(f"receipt: {generator.decoder.receipt}", file=sys.stderr)


def _print_stats(result: Generation) -> None:
    for sample in result.samples:
        stats = sample.stats
        print(
            f"{stats.prompt_tokens} prompt tokens, first token {stats.ttft_ms:.1f} ms, {stats.new_tokens} new tokens "
            f"at {stats.decode_tokens_per_s:.1f} tokens/s, finish reason {sample.finish_reason}, seed {result.seed}",
            file=sys.stderr,
        )


def _typed_prompts() -> Iterator[str]:
    """Prompts from standard input, line by line; the question stands on stderr, so that stdout holds text alone."""
    while True:
        print("prompt >>> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            print(file=sys.stderr)
            return
        if prompt := _text(line).rstrip("\r\n"):
            yield prompt


def _text(read: bytes) -> str:
    try:
        return read.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"standard input: byte {error.start} is no UTF-8 ({error.reason}); convert it to UTF-8 first"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
