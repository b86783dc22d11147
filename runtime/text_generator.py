"""TextGenerator: a package, loaded once, that writes text."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from .activations import NARROW
from .async_stream import Abandonment, read_in_threads
from .batch import RESULTS_AHEAD, Batch, Item, OnError
from .config import GPT2Config
from .decoder import Decoder
from .errors import DeviceError, PackageError, RequestError
from .package import Device, Package, open_package, read_manifest
from .prepacked import prepacked_model
from .request import Cancellation, Generation, LogitsProcessor, Overflow, Prompt, Request
from .row import Job, Row, as_ids, prepare
from .sampling import SamplingOptions
from .scheduler import Scheduler
from .session import activations_here, check_needs, checked_threads
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 8
"""Samples that run together where no number is named. 124M int8, 168 tokens in each: a step of one row takes 4.0 ms,
of 8 rows 8.9 ms, of 16 rows 14.0 ms."""


class TextGenerator:
    """A loaded package. Threads may share it."""

    def __init__(self, package: Package, decoder: Decoder, tokenizer: Tokenizer) -> None:
        """Most callers want `TextGenerator.load`."""
        self.package = package
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.default_sampling = SamplingOptions.from_generation_config(package.generation_config())

    @classmethod
    def load(
        cls,
        package: str | Path,
        *,
        device: Device = "cpu",
        threads: int | None = None,
        prepacked_dir: str | Path | None = None,
    ) -> TextGenerator:
        """Check a package and open it.

        Args:
            package: the folder.
            device: where to run; another device than the package was made for is refused.
            threads: worker threads; None takes the processors that this process may use.
            prepacked_dir: a folder of this machine that keeps the weights as its processor multiplies them: made at
                the first load, opened instead of the package's from then on. See `runtime.prepacked`.
        Raises:
            PackageError: the folder is no package, or damaged.
            DeviceError: the device is not what would run, or lacks what the package needs.
            TokenizerError: the tokenizer cannot be read, or the tokenizers library is not installed.
            MachineError: memory ran out, or prepacked_dir cannot be written.
        """
        opened = open_package(package)
        tokenizer = Tokenizer.load(opened.tokenizer_path)
        decoder = open_decoder(opened, device=device, threads=threads, prepacked_dir=prepacked_dir)
        return cls(opened, decoder, tokenizer)

    @property
    def config(self) -> GPT2Config:
        return self.package.manifest.config

    def generate(
        self,
        prompt: Prompt = "",
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        sampling: SamplingOptions | None = None,
        num_return_sequences: int = 1,
        logits_processor: LogitsProcessor | None = None,
        overflow: Overflow = "error",
        reencode_stride: int | None = None,
        deadline_ms: float | None = None,
        cancel: Cancellation | None = None,
    ) -> Generation:
        """Continue a prompt; the arguments are those of `Request`.

        Raises:
            RequestError: prompt and new tokens do not fit the context, or a value is out of range.
            TokenizerError: the prompt is no text.
            MachineError: memory ran out, or the device computes nonsense.
        """
        job = self._job(
            Request(
                prompt,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                sampling=sampling,
                num_return_sequences=num_return_sequences,
                logits_processor=logits_processor,
                overflow=overflow,
                reencode_stride=reencode_stride,
                deadline_ms=deadline_ms,
                cancel=cancel,
            )
        )
        for _ in self._run([job]):
            pass
        return job.generation(self.tokenizer)

    def stream(
        self,
        prompt: Prompt = "",
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        sampling: SamplingOptions | None = None,
        logits_processor: LogitsProcessor | None = None,
        overflow: Overflow = "error",
        reencode_stride: int | None = None,
        deadline_ms: float | None = None,
        cancel: Cancellation | None = None,
    ) -> Iterator[str]:
        """Continue a prompt and yield the text as soon as it is certain; arguments and errors as `generate`.

        A character whose bytes are spread over several tokens comes when its last byte has come. The request is checked
        at the call, and runs as far as it is read.
        """
        return self._stream(
            self._job(
                Request(
                    prompt,
                    max_new_tokens=max_new_tokens,
                    min_new_tokens=min_new_tokens,
                    sampling=sampling,
                    logits_processor=logits_processor,
                    overflow=overflow,
                    reencode_stride=reencode_stride,
                    deadline_ms=deadline_ms,
                    cancel=cancel,
                )
            )
        )

    def stream_async(
        self,
        prompt: Prompt = "",
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        sampling: SamplingOptions | None = None,
        logits_processor: LogitsProcessor | None = None,
        overflow: Overflow = "error",
        reencode_stride: int | None = None,
        deadline_ms: float | None = None,
        cancel: Cancellation | None = None,
    ) -> AsyncIterator[str]:
        """`stream` for an event loop, which stays free: each piece is computed in a worker thread.

        When the reader goes away, as when its task is cancelled, what is under way ends before the next token.
        """
        abandonment = Abandonment(cancel)
        pieces = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            sampling=sampling,
            logits_processor=logits_processor,
            overflow=overflow,
            reencode_stride=reencode_stride,
            deadline_ms=deadline_ms,
            cancel=abandonment,
        )
        return read_in_threads(pieces, abandonment)

    def generate_many(
        self,
        requests: Iterable[Item],
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        ordered: bool = True,
        on_error: OnError = "raise",
    ) -> Iterator[Generation]:
        """Answer any number of requests, `batch_size` samples at a time; each gets what `generate` would give it.

        A request is read when a slot is free for it: an iterable that waits makes the running rows wait. Memory holds
        the cache, the requests that run, and a bounded number of results. Where the iterable itself raises, or a
        logits_processor does, that ends all.

        Args:
            requests: requests, or mere prompts; a GPT2EdgeError stands for one that could not be read.
            batch_size: slots of the cache: samples that run together. Each holds as many tokens as the longest needs.
            ordered: give results in the order of the requests; False gives each as soon as it has ended, and its
                `index` tells which it is.
            on_error: what to do where a request is refused, or fails alone. "raise" raises its error, and the index
                of the request, when its turn has come, and ends; "return" gives a Generation without samples that
                holds the error, and goes on.
        Raises:
            RequestError: batch_size or on_error is none of those; or, with "raise", as `generate`.
            TokenizerError: with "raise", a prompt is no text.
            MachineError: memory ran out, or the device computes nonsense.
        """
        if isinstance(requests, (str, Request)):
            raise RequestError(f"requests is one {type(requests).__name__}, expected several; put it into a list")
        if type(batch_size) is not int or batch_size < 1:
            raise RequestError(f"batch_size is {batch_size!r}, expected a whole number above 0")
        if on_error not in get_args(OnError):
            raise RequestError(f"on_error is {on_error!r}, expected one of {', '.join(get_args(OnError))}")
        batch = Batch(requests, prepare=self._job, tokenizer=self.tokenizer, ahead=batch_size * RESULTS_AHEAD)
        scheduler = Scheduler(self.decoder, slots=batch_size)
        return batch.run(scheduler, ordered=ordered, on_error=on_error)

    def steps(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        sampling: SamplingOptions | None = None,
        logits_processor: LogitsProcessor | None = None,
    ) -> Iterator[dict[int, int]]:
        """Continue several prompts together, a token each at a time; other arguments and errors as `generate`.

        Yields:
            The ids that a step chose, by the prompt's index; a prompt is absent once its text has ended. All prompts
            are run before the first step.
        """
        if not len(prompts):
            raise RequestError("no prompts, expected at least one")
        jobs = [
            self._job(
                Request(
                    prompt,
                    max_new_tokens=max_new_tokens,
                    min_new_tokens=min_new_tokens,
                    sampling=sampling,
                    logits_processor=logits_processor,
                ),
                index,
            )
            for index, prompt in enumerate(prompts)
        ]
        return ({row.job.index: row.ids[-1] for row in changed} for changed in self._run(jobs))

    def score(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
        """How probable each token was to the model.

        Args:
            ids: [T] token ids, 2 <= T <= n_ctx.
        Returns:
            [T - 1] float64, natural log-probability of ids[1], ids[2] ... given all before it.
        Raises:
            RequestError: ids are out of range, too few, or longer than the context.
        """
        array = as_ids(ids)
        if array.size < 2:
            raise RequestError(f"{array.size} tokens to score, expected at least 2: the first one is given")
        self.decoder.check_ids(array, past=0)
        scores = np.empty(len(array) - 1)
        start = 0
        for logits in self.decoder.logits(array[:-1]):  # [S, V]
            targets = array[start + 1 : start + 1 + len(logits)]
            peak = logits.max(axis=1)
            total = np.exp(logits - peak[:, None]).sum(axis=1, dtype=np.float64)
            scores[start : start + len(logits)] = logits[np.arange(len(logits)), targets] - peak - np.log(total)
            start += len(logits)
        return scores

    def _job(self, request: Request, index: int = 0) -> Job:
        return prepare(
            request,
            index=index,
            tokenizer=self.tokenizer,
            config=self.config,
            default_sampling=self.default_sampling,
        )

    def _run(self, jobs: Sequence[Job]) -> Iterator[list[Row]]:
        """Run some requests together; a row that fails ends them all."""
        slots = sum(job.request.num_return_sequences for job in jobs)
        scheduler = Scheduler(self.decoder, slots=slots, capacity=max(job.capacity for job in jobs))
        rows = chain.from_iterable(job.new_rows() for job in jobs)
        for changed in scheduler.run(lambda: next(rows, None)):
            for row in changed:
                if row.error is not None:
                    raise row.error
            yield changed

    def _stream(self, job: Job) -> Iterator[str]:
        decoder = self.tokenizer.stream()
        n_read = 0
        for (row,) in self._run([job]):
            fresh = row.new_ids[n_read:]
            n_read += len(fresh)
            if text := "".join(map(decoder.push, fresh)):
                yield text
        if text := decoder.finish():
            yield text


def open_decoder(
    package: Package,
    *,
    device: Device = "cpu",
    threads: int | None = None,
    prepacked_dir: str | Path | None = None,
) -> Decoder:
    """Open a package's graph on the device that was asked for; arguments and errors as `TextGenerator.load`."""
    check_runs_here(package, device=device)
    checked_threads(threads)  # before prepacked weights are made
    manifest = package.manifest
    activations = activations_here(manifest.needs)
    if activations == NARROW:
        logger.warning(
            "%s: this processor lacks %s: activations are rounded to 7 bits instead of 8",
            package.folder,
            " and ".join(manifest.needs.processor),
        )
    decoder = Decoder.open(
        package.model_path if prepacked_dir is None else prepacked_model(package, Path(prepacked_dir)),
        manifest.config,
        attention=manifest.attention,
        kv_cache=manifest.kv_cache,
        device=device,
        threads=threads,
        activations=activations,
        optimized=prepacked_dir is not None,
    )
    if read_manifest(package.folder) != manifest:
        raise PackageError(f"{package.folder} was replaced while it was opened; open it again")
    return decoder


def check_runs_here(package: Package, *, device: Device) -> None:
    """Refuse a package that was made for another device, or that needs what this machine lacks.

    Raises:
        DeviceError: with what to do instead.
    """
    made_for = package.manifest.device
    if device != made_for:
        raise DeviceError(
            f"{package.folder} was made for {made_for}, asked for {device}; load it with device {made_for}, or convert "
            f"the checkpoint for {device}"
        )
    check_needs(package.manifest.needs, device=device)
