"""A package in a process of its own: loaded once, run again and again, its memory told apart from all others'."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from ..errors import GPT2EdgeError, MachineError
from ..package import Device, Package
from ..prepacked import prepacked_model
from ..session import load_onnxruntime
from ..text_generator import LogitsProcessor, TextGenerator
from .machine import peak_rss_bytes, reset_peak_rss
from .page_cache import drop_from_page_cache, resident_share
from .timing import RunTimes, time_run
from .workload import Workload

Result = TypeVar("Result")

COLD_SHARE = 0.05
"""Of a package's pages that may still be in the page cache when a load is called cold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What runs where; `logits_processor` must be picklable, since it goes to another process."""

    package: Package
    device: Device = "cpu"
    threads: int
    logits_processor: LogitsProcessor | None = None
    prepacked_dir: Path | None = None

    def load(self) -> TextGenerator:
        return TextGenerator.load(
            self.package.folder, device=self.device, threads=self.threads, prepacked_dir=self.prepacked_dir
        )

    def files(self) -> list[Path]:
        """What a load reads, once there was one."""
        entry = [] if self.prepacked_dir is None else prepacked_model(self.package, self.prepacked_dir).parent.iterdir()
        return [*(self.package.folder / name for name in self.package.manifest.files), *entry]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an engine says once it is open."""

    load_peak_rss_bytes: int | None
    providers: tuple[str, ...]  # that onnxruntime says it runs on
    onnxruntime: str


@dataclass(frozen=True, slots=True)
class EngineRun:
    """One run, and the highest resident memory during it."""

    times: RunTimes
    peak_rss_bytes: int | None
    load: int = 0  # which of the loads it ran behind


@dataclass(frozen=True, slots=True)
class Loads:
    """Times of `TextGenerator.load`, in a process that had imported everything before."""

    warm_ms: tuple[float, ...]
    cold_ms: float | None
    cold_resident_share: float | None  # of the package's pages, when the cold load began


class Engine:
    """The parent's side. Use it in a with block, or close it: the process and its memory go with it.

    Raises:
        GPT2EdgeError: as `TextGenerator.load`.
        MachineError: the process died, or its memory ran out.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._process = _Process[Any](_serve, placement)
        self.loaded: Loaded = self._process.receive()

    def run(self, workload: Workload, number: int) -> EngineRun:
        """Run a workload once; errors as `timing.time_run`."""
        self._process.send((workload, number))
        result: EngineRun = self._process.receive()
        return result

    def close(self) -> None:
        self._process.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()


def time_loads(placement: Placement, runs: int) -> Loads:
    """Load a package several times warm, after once cold if that can be had; errors as `Engine`."""
    process = _Process[Loads](_time_loads, placement, runs)
    try:
        return process.receive()
    finally:
        process.close()


class _Process(Generic[Result]):
    """A child process at the other end of a pipe. An error that it meets is raised here."""

    def __init__(self, target: Any, *arguments: Any) -> None:
        # spawn: a fork would inherit onnxruntime's threads half
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_report_errors, args=(target, theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, message: object) -> None:
        with suppress(BrokenPipeError):  # it died: receive tells how
            self._pipe.send(message)

    def receive(self) -> Result:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join(timeout=5)
            raise MachineError(
                f"the process that ran the package ended with status {self._process.exitcode}; if the system killed it "
                "(-9), its memory ran out: close other programs, or measure fewer packages at once"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        result: Result = answer
        return result

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _report_errors(target: Any, pipe: Connection, *arguments: Any) -> None:
    """The child's first function."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent says what is to be done
    with suppress(EOFError, ConnectionError):  # the parent is done, or was interrupted before it read our answer
        try:
            target(pipe, *arguments)
        except GPT2EdgeError as error:
            pipe.send(error)
        except MemoryError:
            pipe.send(MachineError("out of memory while the package ran; close programs, or take a smaller model"))


def _serve(pipe: Connection, placement: Placement) -> None:
    generator = placement.load()
    generator.decoder.settle()
    session = generator.decoder.session
    pipe.send(Loaded(peak_rss_bytes(), tuple(session.get_providers()), load_onnxruntime().__version__))
    while True:
        workload, number = pipe.recv()
        texts = workload.texts(generator.tokenizer, number)
        gc.collect()  # not in the middle of a run
        reset_peak_rss()
        times = time_run(generator, texts, new_tokens=workload.new_tokens, logits_processor=placement.logits_processor)
        pipe.send(EngineRun(times, peak_rss_bytes()))


def _time_loads(pipe: Connection, placement: Placement, runs: int) -> None:
    placement.load().decoder.settle()  # what a first load imports and initialises is no load time
    gc.collect()
    paths = placement.files()
    dropped = drop_from_page_cache(paths)
    resident = resident_share(paths)
    is_cold = dropped and resident is not None and resident <= COLD_SHARE
    first = _time_load(placement)
    warm = tuple(_time_load(placement) for _ in range(runs))
    pipe.send(Loads(warm, first if is_cold else None, resident))


def _time_load(placement: Placement) -> float:
    started = time.perf_counter()
    generator = placement.load()
    elapsed_ms = (time.perf_counter() - started) * 1e3
    generator.decoder.settle()  # or the next load would be timed beside it
    del generator
    gc.collect()  # its memory goes back before the next is loaded
    return elapsed_ms
