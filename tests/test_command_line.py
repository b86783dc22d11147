"""What every command has in common: one line for what went wrong, and the exit status that says whose fault it was."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import errors
from runtime.command_line import CommandLineParser, print_json, run_command

ROOT = Path(__file__).parent.parent


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (errors.PackageError("packages/x: damaged"), 2, "error: packages/x: damaged\n"),
        (errors.RequestError("two\nlines\tand a tab"), 2, "error: two lines and a tab\n"),
        (errors.MachineError("no memory"), 1, "error: no memory\n"),
        (errors.VerificationError("did not hold"), 3, "error: did not hold\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (MemoryError(), 1, "error: out of memory (no detail given); close other programs or take a smaller model\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/model.onnx"),
            1,
            "error: out/model.onnx: No space left on device; free space and run again\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "x"),
            1,
            "error: x: Permission denied; mend it and run again\n",
        ),
    ],
)
def test_what_goes_wrong_is_one_line_and_a_status(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    assert run_command(raising(error)) == status
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", line)


def test_our_own_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_the_commands_own_status_is_passed_on() -> None:
    assert run_command(lambda: 0) == 0


def test_every_error_ends_with_a_status_that_its_docstring_draws() -> None:
    drawn = dict.fromkeys(("MachineError",), 1) | dict.fromkeys(("VerificationError",), 3)
    tree = errors.GPT2EdgeError.__subclasses__()
    assert {error.__name__: error.exit_status for error in tree} == {
        error.__name__: drawn.get(error.__name__, 2) for error in tree
    }
    assert all(f"-- {error.__name__}" in str(errors.__doc__) for error in tree)


def test_bad_usage_is_one_line_that_names_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    parser = CommandLineParser(prog="python -m x")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--no-such-option"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "python -m x: unrecognized arguments: --no-such-option; see python -m x --help\n"
    )


def test_a_terminal_that_lacks_a_character_gets_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run_command(lambda: print("“yes”") or 0) == 0
    assert terminal.buffer.getvalue() == b"?yes?\n"


def test_json_survives_a_terminal_that_lacks_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run_command(lambda: print_json({"text": "“yes”"}) or 0) == 0  # type: ignore[func-returns-value]
    assert json.loads(terminal.buffer.getvalue()) == {"text": "“yes”"}


def test_json_is_never_told_of_numbers_that_json_lacks() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"difference": float("nan")})


@pytest.mark.parametrize("flushed", [True, False])
def test_a_reader_that_leaves_early_is_no_error(flushed: bool) -> None:
    script = f"""
import sys
from runtime.command_line import run_command

def write():
    sys.stdin.readline()  # until the reader has gone
    print("text" * 10, flush={flushed})
    return 0

sys.exit(run_command(write))
"""
    read_end, write_end = os.pipe()
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=write_end, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        os.close(write_end)
        os.close(read_end)
        _, complaint = process.communicate(b"\n", timeout=30)
    assert (process.returncode, complaint) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_the_machines_failure_and_free_space_the_step() -> None:
    script = "import sys; from runtime.command_line import run_command; sys.exit(run_command(lambda: print('x') or 0))"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False
        )
    assert (done.returncode, done.stderr) == (1, "error: No space left on device; free space and run again\n")
