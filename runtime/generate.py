"""Write text with a package, from the command line.

python -m runtime.generate PACKAGE "Once upon a time"
python -m runtime.generate PACKAGE --prompts FILE --batch 12 > answers.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from .command_line import print_json, run_command
from .errors import RequestError, TokenizerError
from .generate_options import parse, request_options, sampling_options
from .prompt_file import read_requests
from .request import Generation, Request, RequestOptions
from .text_generator import DEFAULT_BATCH_SIZE, TextGenerator


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    return run_command(lambda: _generate(parse(argv)))


def _generate(options: argparse.Namespace) -> int:
    generator = TextGenerator.load(
        options.package,
        device=options.device,
        threads=options.threads,
        prepacked_dir=options.prepacked_dir,
        draft=options.draft,
        prefix_cache_bytes=options.prefix_cache_bytes,
    )
    asked = request_options(options, sampling_options(options, generator.default_sampling))
    if options.prompts is not None:
        _answer_file(generator, asked, options)
    elif options.interactive:
        for prompt in _typed_prompts():
            try:
                _write(generator, prompt, asked, options)
            except RequestError as error:  # too long, say: the next line may be shorter
                print(f"error: {error}", file=sys.stderr)
    else:
        prompt = _text(sys.stdin.buffer.read()) if options.prompt == "-" else options.prompt
        _write(generator, prompt, asked, options)
    return 0


def _answer_file(generator: TextGenerator, asked: RequestOptions, options: argparse.Namespace) -> None:
    """A line of JSON for each line; a bad one is answered by its error, and the others go on."""
    first_failed, n_failed, n_lines = None, 0, 0
    with _opened(options.prompts) as lines:
        results = generator.generate_many(
            read_requests(lines, Request(**asked)),
            batch_size=DEFAULT_BATCH_SIZE if options.batch is None else options.batch,
            ordered=not options.as_ready,
            on_error="return",
        )
        for result in results:
            if result.error is not None:
                first_failed = first_failed or result
                n_failed += 1
            answer = _as_json(result) if result.error is None else {"error": str(result.error)}
            print_json({"index": result.index} | answer)
            sys.stdout.flush()
            n_lines += 1
    if first_failed is not None:
        line, error = first_failed.index + 1, first_failed.error
        raise RequestError(
            f"{options.prompts}: {n_failed} of {n_lines} lines failed, the first is line {line}: {error}"
        )


def _opened(path: str) -> AbstractContextManager[BinaryIO]:
    if path == "-":
        return nullcontext(sys.stdin.buffer)
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}; name a file of prompts") from error


def _as_json(result: Generation) -> dict[str, Any]:
    values = asdict(result)
    del values["index"], values["error"]  # of a file of prompts alone
    return values


def _write(generator: TextGenerator, prompt: str, asked: RequestOptions, options: argparse.Namespace) -> None:
    """Generate and print; a lone sample is printed as it is written."""
    alone = asked.get("num_return_sequences", 1) == asked.get("num_beams", 1) == 1
    if alone and not options.json and not options.stats:
        for text in generator.stream(prompt, **asked):
            print(text, end="", flush=True)
        print()
        return
    result = generator.generate(prompt, **asked)
    if options.json:
        print_json(_as_json(result) | {"receipt": generator.decoder.receipt.to_dict()})
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
