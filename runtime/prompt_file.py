"""Requests from a file, one a line.

A line that begins with { is a JSON object: "prompt" holds text or token ids, the other names are options of `Request`
and of `SamplingOptions`, and replace those of the command line. Any other line is a prompt as it stands, the empty line
too; a prompt of several lines, or one that begins with {, is written as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from .errors import GPT2EdgeError, RequestError, TokenizerError
from .request import Request
from .sampling import UINT64_MASK, SamplingOptions

SAMPLING_NAMES = frozenset(field.name for field in fields(SamplingOptions))
DRAWN = ("temperature", "top_k", "top_p", "min_p", "typical_p", "rule", "seed")
"""Of them, those that are of account only where tokens are sampled."""
REQUEST_NAMES = frozenset(field.name for field in fields(Request)) - {"sampling", "logits_processor", "cancel"}


def read_requests(lines: Iterable[bytes], default: Request) -> Iterator[Request | GPT2EdgeError]:
    """Read requests line by line.

    Args:
        lines: UTF-8, with or without the line's end.
        default: its options hold where a line names no other. Of its seed each line has its own: the seed plus the
            line's index, so that equal prompts get different texts.
    Yields:
        A request for each line, or what is wrong with it.
    """
    for index, line in enumerate(lines):
        try:
            yield _request(line, _with_seed_of_line(default, index))
        except GPT2EdgeError as error:
            yield error


def with_options(sampling: SamplingOptions, given: Mapping[str, Any]) -> SamplingOptions:
    """Replace some options; whoever names one of `DRAWN`, but not do_sample, wants to sample.

    Raises:
        RequestError: a value is out of range.
    """
    return replace(sampling, **{"do_sample": sampling.do_sample or any(name in given for name in DRAWN), **given})


def _with_seed_of_line(default: Request, index: int) -> Request:
    sampling = default.sampling
    if sampling is None or sampling.seed is None:
        return default
    return replace(default, sampling=replace(sampling, seed=(sampling.seed + index) & UINT64_MASK))


def _request(line: bytes, default: Request) -> Request:
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"byte {error.start} is no UTF-8 ({error.reason}); convert the file first") from error
    if not text.startswith("{"):
        return replace(default, prompt=text)
    try:
        options: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"begins with {{ but is no JSON object ({error}); mend it") from error
    if unknown := sorted(options.keys() - SAMPLING_NAMES - REQUEST_NAMES):
        known = ", ".join(sorted(SAMPLING_NAMES | REQUEST_NAMES))
        raise RequestError(f"unknown options {', '.join(unknown)}, expected some of {known}")
    if not isinstance(options.get("prompt"), (str, list)):
        raise RequestError('has no prompt, expected "prompt" with text or a list of token ids')
    sampling = {name: value for name, value in options.items() if name in SAMPLING_NAMES}
    rest = {name: value for name, value in options.items() if name in REQUEST_NAMES}
    return replace(default, **rest, sampling=with_options(default.sampling or SamplingOptions(), sampling))
