"""What every command has in common: one line for an error, the exit status, text that any terminal can take."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import sys
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from .errors import GPT2EdgeError, RequestError
from .place import Place

USAGE = 2
MACHINE = 1
INTERRUPTED = 130


class CommandLineParser(argparse.ArgumentParser):
    """argparse, with bad usage told in one line that names the help."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def whole_number(least: int) -> Callable[[str], int]:
    """A type for argparse: a whole number, `least` or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number, {least} or more")
        return int(text)

    return parse


def whole_numbers(text: str) -> list[int]:
    """A type for argparse: `1,8` -> [1, 8], each 1 or more, none twice."""
    return list(dict.fromkeys(map(whole_number(1), text.split(","))))


def some_of(what: str, known: Collection[str]) -> Callable[[str], list[str]]:
    """A type for argparse: `int8,int4` -> ["int8", "int4"], each one of those that are known, none twice."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {what} {', '.join(unknown)}, expected some of {', '.join(known)}")
        return names

    return parse


def add_device(parser: argparse._ActionsContainer) -> None:
    """--device, for whatever loads a package: a `Place`, or None for the package's own."""
    parser.add_argument(
        "--device",
        type=_place,
        metavar="cpu|cuda[:N]|tensorrt[:N]",
        help="default: what the package was made for; cuda:1 is the second GPU",
    )


def _place(text: str) -> Place:
    try:
        return Place.parse(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run_command(command: Callable[[], int]) -> int:
    """Run a command and turn what can go wrong into one line on stderr and an exit status.

    Bad input gives 2, a machine that fails us 1, a check that did not hold 3, Ctrl-C 130; see `runtime.errors`. A
    reader that closes the pipe early is no error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal gets question marks, not a traceback
    try:
        status = command()
        sys.stdout.flush()
        return status
    except GPT2EdgeError as error:
        return _fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except MemoryError as error:
        return _fail(
            f"out of memory ({str(error) or 'no detail given'}); close other programs or take a smaller model", MACHINE
        )
    except BrokenPipeError:
        _drop_output()
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        step = "free space and run again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend it and run again"
        return _fail(f"{where}{error.strerror or error}; {step}", MACHINE)


class ProgressLine:
    """One line on stderr that is written over; none where stderr is no terminal."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()

    def show(self, line: str) -> None:
        if self._on:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_error: object) -> None:
        self.show("")


def print_json(values: Any) -> None:
    """The result of a command as one JSON object on stdout; in ASCII, which no terminal's encoding can alter."""
    print(json.dumps(values, allow_nan=False))


def _drop_output() -> None:
    """Nobody reads stdout any more: what it still holds goes nowhere, or the interpreter would complain at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _fail(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status
