"""Whether a killed conversion can harm the package that it was to replace: SIGKILL at random moments, many times.

    scripts/bench kill_conversions CHECKPOINT [--times 100] [--seed 0]

A package is made; then conversions of the same checkpoint to the same place, with --force, are killed, each at a moment
drawn uniformly from the duration of an undisturbed one. At once after each kill the package must verify: every sha256,
and every golden prompt. What a kill leaves stays there for the next conversion to find; a last, undisturbed one must
leave nothing beside the package. Exit status 3 if anything of this did not hold.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Literal, get_args

from export.checkpoint import read_checkpoint
from runtime.command_line import CommandLineParser, run_command
from runtime.errors import GPT2EdgeError, VerificationError
from runtime.package import MANIFEST, open_package
from runtime.text_generator import open_decoder
from runtime.verify import replay

REPOSITORY = Path(__file__).resolve().parents[1]

Moment = Literal["before writing", "while writing", "after publishing", "not at all, it had finished"]


class Target:
    """The place that is converted to, and what tells how far a killed conversion was.

    Raises:
        CheckpointError: what is to be converted is no checkpoint.
    """

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self._checkpoint = read_checkpoint(checkpoint).folder.resolve()
        self.package = folder / "package"
        self._staging = folder / ".package.partial"
        self._mark = self._staging / "left by an earlier conversion"

    def convert(self) -> float:
        """Convert undisturbed; how many seconds it took."""
        started = time.perf_counter()
        _finish(self._start(), 0)
        return time.perf_counter() - started

    def convert_and_kill(self, delay_s: float) -> Moment:
        """Start a conversion, kill it `delay_s` later, and tell what it was doing."""
        if self._staging.exists():
            self._mark.touch()  # a conversion clears what it finds before it writes
        before = self._identity()
        process = self._start()
        time.sleep(delay_s)
        process.kill()
        if _finish(process, 0, -signal.SIGKILL) == 0:
            return "not at all, it had finished"
        if self._identity() != before:
            return "after publishing"
        return "while writing" if self._staging.exists() and not self._mark.exists() else "before writing"

    def verify(self) -> None:
        """What `runtime.verify --full` does."""
        package = open_package(self.package, full=True)
        decoder = open_decoder(package)
        if not all(replay(decoder, golden).held for golden in package.manifest.golden):
            raise VerificationError(f"{self.package}: a golden prompt gave other numbers")

    def refuse_leftovers(self) -> None:
        """Raises VerificationError if anything is beside the package."""
        if left := sorted(path.name for path in self.package.parent.iterdir() if path != self.package):
            raise VerificationError(f"{', '.join(left)} was left beside the package")

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "export.convert", str(self._checkpoint), "--output", str(self.package)]
        return subprocess.Popen(
            [*command, "--force", "--allow-loss"],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _identity(self) -> int:
        """Of the manifest's file: every conversion writes the same bytes, but a file of its own."""
        return (self.package / MANIFEST).stat().st_ino


def _finish(process: subprocess.Popen[str], *expected: int) -> int:
    """Wait for it; its status, which must be one of those."""
    _, errors = process.communicate()
    if process.returncode not in expected:
        raise VerificationError(
            f"a conversion ended with status {process.returncode}: {errors.strip() or 'no message'}"
        )
    return process.returncode


def kill_conversions(target: Target, *, times: int, seed: int) -> int:
    """Kill conversions and look at what they leave; the command's exit status.

    Raises:
        VerificationError: a package was not whole after a kill, or something was left at the end.
    """
    target.convert()
    duration_s = target.convert()  # the first one read from a cold disk
    moments: Counter[Moment] = Counter()
    faults = []
    uniform = random.Random(seed).uniform
    for number in range(1, times + 1):
        delay_s = uniform(0, duration_s)
        try:
            moments[target.convert_and_kill(delay_s)] += 1
            target.verify()
        except (GPT2EdgeError, OSError) as error:
            faults.append(f"kill {number}, after {delay_s:.3f} s: {error}")
        if sys.stderr.isatty():
            print(f"\r{number} of {times}", end="" if number < times else "\n", file=sys.stderr)
    try:
        target.convert()
        target.verify()
        target.refuse_leftovers()
    except (GPT2EdgeError, OSError) as error:
        faults.append(f"undisturbed: {error}")
    print(f"{times} conversions, {duration_s:.2f} s each undisturbed, killed (seed {seed}):")
    print("\n".join(f"{moments[moment]:5d} {moment}" for moment in get_args(Moment)))
    if faults:
        raise VerificationError(f"{len(faults)} faults: {'; '.join(faults)}")
    print("after each kill the package verified; an undisturbed conversion left nothing beside it")
    return 0


def main() -> int:
    options = _parse()
    with tempfile.TemporaryDirectory(prefix="kill-conversions-") as folder:
        return run_command(
            lambda: kill_conversions(Target(options.checkpoint, Path(folder)), times=options.times, seed=options.seed)
        )


def _parse() -> argparse.Namespace:
    parser = CommandLineParser(prog="kill_conversions", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's folder")
    parser.add_argument("--times", type=int, default=100, metavar="N", help="conversions to kill; default: 100")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: 0")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
