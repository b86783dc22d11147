"""TextGenerator: a package, loaded once, that writes text."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .activations import NARROW
from .config import GPT2Config
from .decoder import Decoder
from .errors import DeviceError, PackageError, RequestError
from .needs import activations_here, check_memory, check_needs
from .package import MODEL_FILES, WEIGHTS_SUFFIX, Package, open_package, read_manifest
from .place import Place
from .prepacked import prepacked_model
from .provider import why_not
from .sampling import SamplingOptions, choose_token, fresh_seed, random_uniform
from .session import checked_threads
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 128

Prompt: TypeAlias = "str | Sequence[int] | NDArray[np.int64]"
"""Text, or token ids. Empty means unconditional: the model starts from its end-of-text token."""

LogitsProcessor: TypeAlias = "Callable[[Sequence[int], NDArray[np.float32]], NDArray[np.float32]]"
"""Called before each choice with the row's ids so far, prompt included, and the logits [V], which it may change in
place; returns the logits to choose from."""

FinishReason = Literal["stop", "length"]
"""stop: the model ended the text. length: max_new_tokens were written."""


@dataclass(frozen=True, slots=True)
class SampleStats:
    """Times of one sample. Samples of one request run together, so they share their first token's time."""

    prompt_tokens: int
    new_tokens: int  # the end-of-text that may have ended it included
    ttft_ms: float  # from the call to the first token, tokenisation included
    decode_tokens_per_s: float  # tokens after the first; 0 where there are none


@dataclass(frozen=True, slots=True)
class Sample:
    """A continuation. `ids` are its tokens without the end-of-text that may have ended it, `text` is their text."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: SampleStats


@dataclass(frozen=True, slots=True)
class Generation:
    """What a request gave. The same seed gives the same samples again."""

    prompt_ids: tuple[int, ...]
    seed: int
    samples: tuple[Sample, ...]

    @property
    def text(self) -> str:
        """The text of the first sample."""
        return self.samples[0].text


@dataclass(frozen=True, slots=True)
class _Request:
    """Rows that run together: `samples` of each prompt, one prompt's behind the other's."""

    prompts: tuple[NDArray[np.int64], ...]  # [T] each, T >= 1
    samples: int
    max_new_tokens: int
    min_new_tokens: int
    sampling: SamplingOptions
    seed: int
    logits_processor: LogitsProcessor | None

    @property
    def n_rows(self) -> int:
        return len(self.prompts) * self.samples


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
        device: Place | str | None = None,
        threads: int | None = None,
        prepacked_dir: str | Path | None = None,
    ) -> TextGenerator:
        """Check a package and open it.

        Args:
            package: the folder.
            device: where to run, as "cuda:1"; None takes the first of the kind that the package was made for. Another
                kind is refused.
            threads: worker threads; None takes the processors that this process may use.
            prepacked_dir: a folder of this machine that keeps the weights as its processor multiplies them: made at
                the first load, opened instead of the package's from then on. See `runtime.prepacked`.
        Raises:
            PackageError: the folder is no package, or damaged.
            DeviceError: the device is not what would run, or lacks what the package needs.
            TokenizerError: the tokenizer cannot be read, or the tokenizers library is not installed.
            RequestError: device is no device, threads are out of range, or prepacked_dir goes with a GPU.
            MachineError: memory ran out or would, or prepacked_dir cannot be written.
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
    ) -> Generation:
        """Continue a prompt.

        Args:
            prompt: text or token ids; empty for text out of nothing.
            max_new_tokens: the most that is written; None takes 128, or what the context has room for.
            min_new_tokens: the end-of-text token is not chosen before this many.
            sampling: how tokens are chosen; None takes the package's own defaults (`default_sampling`).
            num_return_sequences: independent samples of the same prompt.
            logits_processor: sees, and may change, what each token is chosen from.
        Raises:
            RequestError: prompt and new tokens do not fit the context, or a value is out of range.
            TokenizerError: the prompt is no text.
            MachineError: memory ran out, or the device computes nonsense.
        """
        started = time.perf_counter()
        request = self._request(
            [prompt],
            samples=num_return_sequences,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            sampling=sampling,
            logits_processor=logits_processor,
        )
        ids: dict[int, list[int]] = defaultdict(list)
        ended_at: dict[int, float] = {}
        first_at = started
        for step, chosen in enumerate(self._steps(request)):
            now = time.perf_counter()
            first_at = now if step == 0 else first_at
            for sample, token_id in chosen.items():
                ids[sample].append(token_id)
                ended_at[sample] = now
        samples = [
            self._sample(request, own, (first_at - started) * 1e3, ended_at[sample] - first_at)
            for sample, own in ids.items()
        ]
        return Generation(tuple(request.prompts[0].tolist()), request.seed, tuple(samples))

    def stream(
        self,
        prompt: Prompt = "",
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        sampling: SamplingOptions | None = None,
        logits_processor: LogitsProcessor | None = None,
    ) -> Iterator[str]:
        """Continue a prompt and yield the text as soon as it is certain; arguments and errors as `generate`.

        A character whose bytes are spread over several tokens comes when its last byte has come.
        """
        steps = self.steps(
            [prompt],
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            sampling=sampling,
            logits_processor=logits_processor,
        )
        return self._stream(steps)

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
        request = self._request(
            prompts,
            samples=1,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            sampling=sampling,
            logits_processor=logits_processor,
        )
        return self._steps(request)

    def score(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
        """How probable each token was to the model.

        Args:
            ids: [T] token ids, 2 <= T <= n_ctx.
        Returns:
            [T - 1] float64, natural log-probability of ids[1], ids[2] ... given all before it.
        Raises:
            RequestError: ids are out of range, too few, or longer than the context.
        """
        array = _as_ids(ids)
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

    def _request(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_new_tokens: int | None,
        min_new_tokens: int,
        sampling: SamplingOptions | None,
        logits_processor: LogitsProcessor | None,
    ) -> _Request:
        if not len(prompts):
            raise RequestError("no prompts, expected at least one")
        ids = tuple(map(self._prompt_ids, prompts))
        longest = max(map(len, ids))
        room = self.config.n_ctx - longest
        if max_new_tokens is None:
            max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, room))
        for name, value in (("max_new_tokens", max_new_tokens), ("num_return_sequences", samples)):
            if type(value) is not int or value < 1:
                raise RequestError(f"{name} is {value!r}, expected a whole number above 0")
        if type(min_new_tokens) is not int or not 0 <= min_new_tokens <= max_new_tokens:
            raise RequestError(f"min_new_tokens is {min_new_tokens!r}, expected 0 to max_new_tokens, {max_new_tokens}")
        if max_new_tokens > room:
            advice = f" or ask for at most {room}" if room else ""
            raise RequestError(
                f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} do not fit the model's context of "
                f"{self.config.n_ctx}; shorten the prompt{advice}"
            )
        sampling = sampling or self.default_sampling
        return _Request(
            prompts=ids,
            samples=samples,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            sampling=sampling,
            seed=fresh_seed() if sampling.seed is None else sampling.seed,
            logits_processor=logits_processor,
        )

    def _prompt_ids(self, prompt: Prompt) -> NDArray[np.int64]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else _as_ids(prompt)
        if not ids.size:
            ids = np.array([self.config.eos_token_id], np.int64)
        self.decoder.check_ids(ids, past=0)
        return ids

    def _steps(self, request: _Request) -> Iterator[dict[int, int]]:
        """Each step's chosen ids by row; a row is absent once it has ended."""
        capacity = max(map(len, request.prompts)) + request.max_new_tokens - 1  # the last token is chosen, not run
        decoding = self.decoder.start(batch=request.n_rows, capacity=capacity)
        logits = np.empty((request.n_rows, self.config.n_vocab), np.float32)  # [B, V]
        for index, prompt in enumerate(request.prompts):
            rows = slice(index * request.samples, (index + 1) * request.samples)
            logits[rows] = decoding.prefill(rows.start, prompt)
            decoding.cache.repeat_row(rows)
        ids = [prompt.tolist() for prompt in request.prompts for _ in range(request.samples)]
        going, current = list(range(request.n_rows)), np.full(request.n_rows, self.config.eos_token_id, np.int64)
        for step in range(request.max_new_tokens):
            if step:
                logits = decoding.decode_step(current)
            chosen = {row: self._choose(request, row, step, ids[row], logits[row]) for row in going}
            yield chosen
            for row, token_id in chosen.items():
                ids[row].append(token_id)
                current[row] = token_id
            going = [row for row, token_id in chosen.items() if token_id != self.config.eos_token_id]
            if not going:
                return

    def _choose(self, request: _Request, row: int, step: int, ids: Sequence[int], logits: NDArray[np.float32]) -> int:
        """A row's next id, from its logits [V], which may be changed."""
        # an embedding may have more rows than there are tokens: padding, which stands for no text
        logits = logits[: self.tokenizer.n_vocab]
        if step < request.min_new_tokens:
            logits[self.config.eos_token_id] = -np.inf
        if request.logits_processor:
            logits = request.logits_processor(ids, logits)
        uniform = random_uniform(request.seed, row % request.samples, len(ids)) if request.sampling.do_sample else 0.0
        return choose_token(logits, request.sampling, uniform)

    def _stream(self, steps: Iterator[dict[int, int]]) -> Iterator[str]:
        decoder = self.tokenizer.stream()
        for chosen in steps:
            if chosen[0] == self.config.eos_token_id:
                break
            if text := decoder.push(chosen[0]):
                yield text
        if text := decoder.finish():
            yield text

    def _sample(self, request: _Request, ids: list[int], ttft_ms: float, decode_s: float) -> Sample:
        stopped = ids[-1] == self.config.eos_token_id
        stats = SampleStats(
            prompt_tokens=len(request.prompts[0]),
            new_tokens=len(ids),
            ttft_ms=ttft_ms,
            decode_tokens_per_s=(len(ids) - 1) / decode_s if len(ids) > 1 else 0.0,
        )
        kept = ids[:-1] if stopped else ids
        return Sample(self.tokenizer.decode(kept), tuple(kept), "stop" if stopped else "length", stats)


def open_decoder(
    package: Package,
    *,
    device: Place | str | None = None,
    threads: int | None = None,
    prepacked_dir: str | Path | None = None,
) -> Decoder:
    """Open a package's graph on the device that was asked for; arguments and errors as `TextGenerator.load`."""
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
    decoder = Decoder.open(
        package.model_path if prepacked_dir is None else prepacked_model(package, Path(prepacked_dir)),
        manifest.config,
        attention=manifest.attention,
        kv_cache=manifest.kv_cache,
        place=place,
        threads=threads,
        activations=activations,
        optimized=prepacked_dir is not None,
    )
    if read_manifest(package.folder) != manifest:
        raise PackageError(f"{package.folder} was replaced while it was opened; open it again")
    return decoder


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


def _as_ids(ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Ids as an array of our own; `Decoder.check_ids` refuses what is no row of integers."""
    try:
        return np.array(ids if len(ids) else np.empty(0, np.int64))
    except ValueError as error:
        raise RequestError(f"token ids are no array ({error}), expected one row of integers") from error
