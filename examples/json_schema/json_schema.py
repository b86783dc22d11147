"""JSON that follows a schema, whatever the model would rather write: llguidance says which tokens may come next.

    python examples/json_schema/json_schema.py packages/774M-int8 schema.json "The old king was called"

What the schema allows is what the model chooses from; and when the tokens that are left are only just enough to end the
document, they end it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from runtime import RequestError, SamplingOptions, TextGenerator
from runtime.command_line import CommandLineParser, run_command

LONGEST_ENDING = 256
"""Tokens that the ending of a document may take; a schema that asks for more, or for itself, is refused."""

SLACK = 24
"""Tokens by which one token may lengthen the shortest ending: as many are held back. A member that opens several
objects, all of whose members are required, needs more of them."""

ENDINGS = ('"}', '"]', '"', "}", "]")
"""What ends something, the most first. A quotation mark stands before brackets, which a string may hold."""


class JsonSchema:
    """A schema, made ready for a package's tokens."""

    def __init__(self, generator: TextGenerator, schema: dict[str, Any]) -> None:
        """Compile it.

        Raises:
            RequestError: llguidance cannot make a grammar of it.
        """
        eos_token_id = generator.config.eos_token_id
        tokenizer = llguidance.LLTokenizer(str(generator.package.tokenizer_path), eos_token=eos_token_id)
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        self._matcher = llguidance.LLMatcher(tokenizer, grammar)
        if self._matcher.is_error():
            raise RequestError(f"no such JSON schema: {' '.join(self._matcher.get_error().split())}; mend the schema")
        spelled = {generator.tokenizer.token_bytes(i): i for i in range(generator.tokenizer.n_vocab)}
        ways_out = [spelled[ending.encode()] for ending in ENDINGS if ending.encode() in spelled]
        self._preferred = [eos_token_id, *ways_out]

    def document(self, *, max_new_tokens: int) -> Document:
        """What lets one sample of `max_new_tokens` be a whole document: one for each sample, used once.

        Raises:
            RequestError: no document is so short.
        """
        document = Document(self._matcher.deep_copy(), self._preferred, max_new_tokens)
        if len(document.ending()) > max_new_tokens:
            raise RequestError(
                f"a document of this schema takes {len(document.ending())} tokens, max_new_tokens is {max_new_tokens}; "
                "ask for more"
            )
        return document


class Document:
    """A logits processor that allows what a document may go on with, and ends it in time."""

    def __init__(self, matcher: llguidance.LLMatcher, preferred: Sequence[int], max_new_tokens: int) -> None:
        self._matcher = matcher
        self._preferred = preferred
        self._left = max_new_tokens
        self._seen: int | None = None  # ids at the last call: the prompt's, then one more each time

    def __call__(self, ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._seen is not None:
            self._matcher.consume_tokens(list(ids[self._seen :]))
        self._seen = len(ids)
        allowed = _allowed(self._matcher)
        ending = self.ending() if self._left <= LONGEST_ENDING + SLACK else []
        if ending and len(ending) + SLACK >= self._left:
            allowed = ending[:1]
        self._left -= 1
        masked = np.full_like(logits, -np.inf)
        masked[allowed] = logits[allowed]
        return masked

    def ending(self) -> list[int]:
        """The tokens of a short way to end the document as it stands; none if it is whole."""
        matcher, tokens = self._matcher.deep_copy(), []
        while not matcher.is_accepting():
            if len(tokens) == LONGEST_ENDING:
                raise RequestError(
                    f"this schema asks for an ending of more than {LONGEST_ENDING} tokens; bound what it requires"
                )
            allowed = _allowed(matcher)
            tokens.append(next((token for token in self._preferred if token in allowed), int(allowed[0])))
            matcher.consume_token(tokens[-1])
        return tokens


def _allowed(matcher: llguidance.LLMatcher) -> NDArray[np.int64]:
    """Ids that may come next."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.flatnonzero(np.unpackbits(bits, bitorder="little"))


def generate_json(
    generator: TextGenerator,
    schema: JsonSchema,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    sampling: SamplingOptions | None = None,
) -> Any:
    """A value that follows the schema, behind a prompt.

    Raises:
        RequestError: prompt and new tokens do not fit the context, or no document is so short.
    """
    document = schema.document(max_new_tokens=max_new_tokens)
    result = generator.generate(prompt, max_new_tokens=max_new_tokens, sampling=sampling, logits_processor=document)
    return json.loads(result.text)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLineParser(description="JSON that follows a schema.")
    parser.add_argument("package", help="folder that export.convert wrote")
    parser.add_argument("schema", type=Path, help="a file with a JSON schema")
    parser.add_argument("prompt", nargs="?", default="")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int)
    return parser.parse_args(argv)


def _run(options: argparse.Namespace) -> int:
    try:
        schema = json.loads(options.schema.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{options.schema} is no JSON ({error}); mend it") from error
    generator = TextGenerator.load(options.package)
    sampling = SamplingOptions(seed=options.seed)
    value = generate_json(
        generator,
        JsonSchema(generator, schema),
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
    )
    print(json.dumps(value, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
