"""TextGenerator: a package, loaded once, that writes text."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray

from .activations import NARROW
from .async_stream import Abandonment, read_in_threads
from .batch import RESULTS_AHEAD, Batch, Item, OnError
from .beam_search import refuse_beams, search_texts
from .config import GPT2Config
from .decoder import Decoder
from .device_decoder import DeviceDecoder
from .drafts import DraftPackage, check_same_tokenizer
from .errors import DeviceError, PackageError, RequestError
from .needs import activations_here, check_memory, check_needs
from .package import MODEL_FILES, WEIGHTS_SUFFIX, Package, ShapeProfile, open_package, read_manifest
from .place import Place
from .prefix_cache import PrefixCache
from .prepacked import prepacked_model
from .provider import why_not
from .request import Generation, LogitsProcessor, Prompt, Request, RequestOptions
from .row import Defaults, Job, Row, as_ids, prepare
from .sampling import SamplingOptions
from .scheduler import Scheduler
from .session import checked_threads
from .speculator import Speculator
from .stopping import StoppingOptions
from .tensorrt_options import engine_folder_here, tensorrt_options
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 12
"""Samples that run together where no number is named. onnxruntime's int8 product takes six rows at a time: a step of
774M int8 takes 21 ms for one row, 32 for 6, 37 for 8, 41 for 12, 51 for 16 (16 tokens in each). 64 requests of mixed
lengths took 0.84 to 0.89 of the time with 12 that they took with 8."""


class TextGenerator:
    """A loaded package. Threads may share it."""

    def __init__(
        self,
        package: Package,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        draft: DraftPackage | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        """Most callers want `TextGenerator.load`."""
        self.package = package
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.draft = draft
        values = package.generation_config()
        refuse_beams(values)
        self.default_sampling = SamplingOptions.from_generation_config(values)
        config = package.manifest.config
        stopping = StoppingOptions.from_generation_config(values, eos_token_id=config.eos_token_id)
        self.defaults = Defaults(tokenizer, config, self.default_sampling, stopping)
        self._speculator = Speculator(draft)
        self.prefix_cache = prefix_cache

    @classmethod
    def load(
        cls,
        package: str | Path,
        *,
        device: Place | str | None = None,
        threads: int | None = None,
        prepacked_dir: str | Path | None = None,
        draft: str | Path | None = None,
        prefix_cache_bytes: int = 0,
    ) -> TextGenerator:
        """Check a package and open it.

        Args:
            package: the folder.
            device: where to run, as "cuda:1"; None takes the first of the kind that the package was made for. Another
                kind is refused.
            threads: worker threads; None takes the processors that this process may use.
            prepacked_dir: a folder of this machine that keeps the weights as its processor multiplies them: made at
                the first load, opened instead of the package's from then on. See `runtime.prepacked`.
            draft: a package with the same tokenizer, small or of fewer bits, that guesses the next tokens of requests
                that are one sample: see `runtime.speculation`.
            prefix_cache_bytes: memory for the beginnings of prompts, which need not be run again; 0 keeps none.
        Raises:
            PackageError: the folder is no package, or damaged.
            DeviceError: the device is not what would run, or lacks what the package needs.
            TokenizerError: the tokenizer cannot be read, or the tokenizers library is not installed.
            RequestError: device is no device, threads or prefix_cache_bytes are out of range, the draft has another
                tokenizer, or an option does not go with a GPU.
            MachineError: memory ran out or would, or prepacked_dir cannot be written.
        """
        opened = open_package(package)
        tokenizer = Tokenizer.load(opened.tokenizer_path)
        if type(prefix_cache_bytes) is not int or prefix_cache_bytes < 0:
            raise RequestError(f"prefix_cache_bytes is {prefix_cache_bytes!r}, expected a whole number from 0 up")
        if opened.manifest.device != "cpu" and (draft is not None or prefix_cache_bytes):
            raise RequestError(
                f"a draft and a prefix cache are for the cpu, {package} is for {opened.manifest.device}; leave them out"
            )
        guessing = None if draft is None else open_package(draft)
        if guessing is not None:
            check_same_tokenizer(guessing, opened)
        decoder = open_decoder(
            opened, device=device, threads=threads, prepacked_dir=prepacked_dir, takes_turns=guessing is not None
        )
        drafting = None
        if guessing is not None:
            drafting = DraftPackage(open_decoder(guessing, device=device, threads=threads, takes_turns=True))
        return cls(
            opened,
            decoder,
            tokenizer,
            draft=drafting,
            prefix_cache=PrefixCache(decoder, max_bytes=prefix_cache_bytes) if prefix_cache_bytes else None,
        )

    @property
    def config(self) -> GPT2Config:
        return self.package.manifest.config

    def generate(self, prompt: Prompt = "", **options: Unpack[RequestOptions]) -> Generation:
        """Continue a prompt.

        Args:
            prompt: text or token ids; empty for text out of nothing.
            options: the other fields of `Request`.
        Raises:
            RequestError: prompt and new tokens do not fit the context, a value is out of range, or options exclude each
                other.
            TokenizerError: the prompt is no text.
            MachineError: memory ran out, or the device computes nonsense.
        """
        request = Request(prompt, **options)
        job = self._job(request)
        if request.num_beams != 1:
            return search_texts(self.decoder, job)
        for _ in self._run([job]):
            pass
        return job.generation()

    def stream(self, prompt: Prompt = "", **options: Unpack[RequestOptions]) -> Iterator[str]:
        """Continue a prompt and yield the text as soon as it is certain; arguments and errors as `generate`.

        A character whose bytes are spread over several tokens comes when its last byte has come, and what may be the
        beginning of a stop string when it turns out to be none. The request is checked at the call, and runs as far as
        it is read.
        """
        request = Request(prompt, **options)
        if request.num_return_sequences != 1:
            raise RequestError(
                f"num_return_sequences is {request.num_return_sequences}, but a stream is one text; ask for several "
                "with generate"
            )
        return self._stream(self._one_of_many(request, guesses=True))

    def stream_async(self, prompt: Prompt = "", **options: Unpack[RequestOptions]) -> AsyncIterator[str]:
        """`stream` for an event loop, which stays free: each piece is computed in a worker thread.

        When the reader goes away, as when its task is cancelled, what is under way ends before the next token.
        """
        abandonment = Abandonment(options.get("cancel"))
        options["cancel"] = abandonment
        return read_in_threads(self.stream(prompt, **options), abandonment)

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
            batch_size: slots of the cache: samples that run together. A slot's memory grows to what its longest takes.
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
        batch = Batch(requests, prepare=self._one_of_many, ahead=batch_size * RESULTS_AHEAD)
        scheduler = Scheduler(self.decoder, slots=batch_size, prefix_cache=self.prefix_cache)
        return batch.run(scheduler, ordered=ordered, on_error=on_error)

    def steps(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
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
        requests = [
            Request(
                prompt,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                sampling=sampling,
                logits_processor=logits_processor,
            )
            for prompt in prompts
        ]
        jobs = [self._job(request, index) for index, request in enumerate(requests)]
        return ({row.job.index: row.ids[-1] for row in changed} for changed in self._run(jobs, guesses=False))

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
        if self.package.manifest.device != "cpu" and (request.num_beams != 1 or request.prompt_lookup or request.exact):
            raise RequestError("beam search, prompt_lookup and exact are for the cpu so far; leave them out")
        return prepare(request, self.defaults, index=index)

    def _one_of_many(self, request: Request, index: int = 0, *, guesses: bool = False) -> Job:
        """A request that does not have `generate` to itself."""
        if request.num_beams != 1:
            raise RequestError(f"num_beams is {request.num_beams}, but only generate searches beams; leave it out")
        if not guesses and (request.prompt_lookup or request.exact):
            raise RequestError("prompt_lookup and exact are for one sample at a time; ask generate or stream for it")
        return self._job(request, index)

    def _run(self, jobs: Sequence[Job], *, guesses: bool = True) -> Iterator[list[Row]]:
        """Run some requests together; a row that fails ends them all."""
        slots = sum(job.request.num_return_sequences for job in jobs)
        scheduler = Scheduler(
            self.decoder,
            slots=slots,
            capacity=max(job.capacity for job in jobs),
            prefix_cache=self.prefix_cache,
            speculator=self._speculator if guesses and slots == 1 else None,
        )
        rows = chain.from_iterable(job.new_rows() for job in jobs)
        for changed in scheduler.run(lambda: next(rows, None)):
            for row in changed:
                if row.error is not None:
                    raise row.error
            yield changed

    def _stream(self, job: Job) -> Iterator[str]:
        job.follows_text = True
        for (row,) in self._run([job]):
            assert row.text is not None, "the job follows it"
            if row.ended:
                row.text.finish()
            if fresh := row.text.read():
                yield fresh


def open_decoder(
    package: Package,
    *,
    device: Place | str | None = None,
    threads: int | None = None,
    prepacked_dir: str | Path | None = None,
    takes_turns: bool = False,
) -> Decoder:
    """Open a package's graph on the device that was asked for; other arguments and errors as `TextGenerator.load`.

    Args:
        takes_turns: on the CPU, see `session.open_session`: demo models that draft for each other write twice as fast.
    """
    place = check_runs_here(package, Place.parse(device) if isinstance(device, str) else device)
    checked_threads(threads)  # before prepacked weights are made
    if prepacked_dir is not None and place.device != "cpu":
        raise RequestError(f"weights are prepacked for a processor, and {place} is none; leave prepacked_dir out")
    manifest = package.manifest
    activations = activations_here(manifest.needs)
    if activations == NARROW:
        logger.warning(
            "%s: this processor lacks %s: activations are rounded to 7 bits instead of 8",
            package.folder,
            " and ".join(manifest.needs.processor),
        )
    decoder: Decoder
    if place.device == "cuda":
        decoder = DeviceDecoder.of_package(package, place, threads=threads)
    else:
        decoder = Decoder.open(
            package.model_path if prepacked_dir is None else prepacked_model(package, Path(prepacked_dir)),
            manifest.config,
            attention=manifest.attention,
            kv_cache=manifest.kv_cache,
            place=place,
            threads=threads,
            activations=activations,
            optimized=prepacked_dir is not None,
            takes_turns=takes_turns,
            **_compiled(package, place),
        )
    if read_manifest(package.folder) != manifest:
        raise PackageError(f"{package.folder} was replaced while it was opened; open it again")
    return decoder


class _Compiled(TypedDict, total=False):
    provider_settings: Mapping[str, str]
    profile: ShapeProfile


def _compiled(package: Package, place: Place) -> _Compiled:
    """What a package that is compiled for its device is opened with."""
    if place.device != "tensorrt":
        return {}
    folder = engine_folder_here(package.manifest, place)
    return {
        "provider_settings": tensorrt_options(package.manifest, folder),
        "profile": package.manifest.profile,
    }


def check_runs_here(package: Package, place: Place | None = None) -> Place:
    """Refuse a package that was made for another device, or that needs what this machine lacks.

    Args:
        package: what would run.
        place: where; None takes the first device of the kind that it was made for.
    Returns:
        The place.
    Raises:
        DeviceError: with what to do instead.
        MachineError: its weights are larger than the memory that this process may take.
    """
    manifest = package.manifest
    place = place or Place(manifest.device)
    if place.device != manifest.device:
        fault = why_not(place)
        raise DeviceError(
            f"{package.folder} was made for {manifest.device}, asked for {place}; load it with device "
            f"{manifest.device}, or convert the checkpoint for {place.device}"
            + (f", which cannot run here: {fault}" if fault else "")
        )
    check_needs(manifest.needs, device=place.device)
    if place.device == "cpu":
        check_memory(manifest.files[MODEL_FILES[manifest.precision] + WEIGHTS_SUFFIX].bytes)
    return place
