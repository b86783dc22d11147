"""Is the package the model? The real runtime against the oracle, on prompts run in every way.

Both are judged on the same sequences: a few prompts, each with the package's own greedy continuation, so that one pass
of the oracle tells whether each of these greedy ids was the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantization.divergence import kl_divergence, top1_agreement
from runtime.config import GPT2Config
from runtime.decoder import Decoder
from runtime.errors import VerificationError
from runtime.package import GoldenPrompt, Precision
from runtime.tokenizer import Tokenizer
from runtime.verify import run_each_way

from .checkpoint_files import Float32Array
from .reference import reference_logits

PROMPTS = (
    "",  # from the end-of-text token alone
    "The quick brown fox jumps over the lazy dog. It was not the first time, and by now the dog had learned to keep "
    "still: whatever it did, the story went on without it.",
    "Question: 12 + 30 = ?\nAnswer: 42\n\nEnglish: Where is the station?\nDeutsch: Wo ist der Bahnhof? — “Über die "
    "Brücke”\n",
)
"""Prose, numbers, quotation marks, accents and line ends: what a tokenizer and a model may trip over."""

PROMPT_TOKENS = 64
"""A longer prompt is cut: running it token by token is the slowest part of a conversion."""

GREEDY_TOKENS = 16
TOP_LOGITS = 10
SMALLEST_SPREAD = 1e-6
"""Standard deviation of a position's logits below which they count as equal; a model of zeros is judged by it."""

FP32_TOLERANCE = 1e-3
"""How far an fp32 logit may be from the oracle's, in standard deviations of the logits of its position. Measured: 1e-5
for the demo model, 1e-5 for 124M of random weights; a wrong scale, epsilon or activation moves it by more than 1e-2."""

REPLAY_FLOOR: Mapping[Precision, float] = {"fp32": FP32_TOLERANCE, "fp16": 0.05, "int8": 0.05, "int4": 0.05}
REPLAY_MARGIN = 2.0
"""How far a golden logit may move on another processor, in the same unit: this many times what it moves here between
ways of running the same ids, where a float rounding turns an int8 one, and the floor at least."""

MAX_KL: Mapping[Precision, float] = {"fp16": 0.002, "int8": 0.02, "int4": 0.1}
"""Nats per token. Plain 4-bit weights lose 0.03 to 0.05 on the demo model: int8 that loses as much is not worth its
size. Measured on the demo model: fp16 2e-6, int8 0.0005, int4 0.019, the last two calibrated."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was measured, and the prompts that the package carries to the device."""

    tokens: int
    kl: float  # mean over the tokens, nats, oracle to package, of the worst way to run them
    top1: float  # share of tokens, likewise
    largest_difference: float  # of a logit
    largest_relative_difference: float  # of a logit, in standard deviations of its position's logits
    greedy_agreement: float  # share of greedy ids that are the oracle's too
    greedy_faults: int  # greedy ids that are further behind the oracle's than a logit may move
    golden: tuple[GoldenPrompt, ...]

    def quality(self) -> dict[str, float]:
        """The figures for the manifest, the card and `--json`."""
        names = ("tokens", "kl", "top1", "largest_difference", "greedy_agreement")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class _Run:
    """One prompt as the package ran it."""

    prompt_ids: NDArray[np.int64]  # [T]
    greedy_ids: NDArray[np.int64]  # [N], N >= 1
    ways: Mapping[str, Float32Array]  # by way of running them, logits [T + N - 1, V]

    @property
    def sequence(self) -> NDArray[np.int64]:
        """The ids that the logits follow, [T + N - 1]."""
        return np.concatenate([self.prompt_ids, self.greedy_ids[:-1]])


def verify_decoder(
    decoder: Decoder,
    tokenizer: Tokenizer,
    tensors: Mapping[str, Float32Array],
    precision: Precision,
    *,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Run the prompts with the package and with the oracle, and measure how far they are apart.

    Args:
        decoder: the package's graph, opened by the real runtime.
        tokenizer: the package's.
        tensors: the checkpoint's weights, read layer by layer.
        precision: says how far logits may move between processors.
        progress: called with one line of text before each step.
    """
    report = progress or (lambda _line: None)
    config = decoder.config
    runs = []
    for number, text in enumerate(PROMPTS, start=1):
        report(f"package: prompt {number} of {len(PROMPTS)}")
        ids = prompt_ids(text, tokenizer, config)
        runs.append(
            _Run(ids, *run_each_way(decoder, ids, n_greedy=max(1, min(GREEDY_TOKENS, config.n_ctx - len(ids)))))
        )
    expected = reference_logits(config, tensors, [run.sequence for run in runs], progress)
    return _compare(runs, expected, REPLAY_FLOOR[precision])


def check(verification: Verification, precision: Precision, *, allow_loss: bool = False) -> None:
    """Hold what was measured against the bars.

    Raises:
        VerificationError: fp32 is beyond its tolerance or chose another greedy id; another precision lost
            more than its MAX_KL, unless `allow_loss`.
    """
    if precision == "fp32":
        # "not <=" because a NaN must not pass
        if not verification.largest_relative_difference <= FP32_TOLERANCE or verification.greedy_faults:
            raise VerificationError(
                f"the fp32 graph is not the model: its logits differ from the reference by up to "
                f"{verification.largest_relative_difference:.2g} standard deviations, expected "
                f"at most {FP32_TOLERANCE}, "
                f"and {verification.greedy_agreement:.1%} of its greedy ids agree; please report this checkpoint"
            )
    elif not verification.kl <= MAX_KL[precision] and not (allow_loss and np.isfinite(verification.kl)):
        raise VerificationError(
            f"{precision} loses too much on this model: KL {verification.kl:.4f} nats a token, expected at most "
            f"{MAX_KL[precision]}; convert with --precision fp32 (fp16 for a GPU), or accept the loss with --allow-loss"
        )


def prompt_ids(text: str, tokenizer: Tokenizer, config: GPT2Config) -> NDArray[np.int64]:
    """A prompt's ids, cut so that the continuation fits the context too."""
    ids = tokenizer.encode(text) if text else np.array([config.eos_token_id], np.int64)
    return ids[: max(1, min(PROMPT_TOKENS, config.n_ctx - GREEDY_TOKENS))]


def _compare(runs: Sequence[_Run], expected: Sequence[Float32Array], replay_floor: float) -> Verification:
    """Every run against the oracle's logits [T + N - 1, V] of the same ids.

    Maxima are numpy's: Python's own would let a NaN pass that is not the first.
    """
    spreads = [  # [T + N - 1, 1] each
        np.maximum(reference.std(axis=-1, keepdims=True), SMALLEST_SPREAD) for reference in expected
    ]
    differences = [
        (np.abs(logits - reference).max(axis=-1, keepdims=True), spread)
        for run, reference, spread in zip(runs, expected, spreads, strict=True)
        for logits in run.ways.values()
    ]
    moved = [
        np.abs(logits - run.ways["one run"]).max(axis=-1, keepdims=True) / spread
        for run, spread in zip(runs, spreads, strict=True)
        for logits in run.ways.values()
    ]
    replay_tolerance = max(replay_floor, REPLAY_MARGIN * float(np.max([each.max() for each in moved])))
    tolerances = [
        replay_tolerance * float(spread[len(run.prompt_ids) - 1, 0]) for run, spread in zip(runs, spreads, strict=True)
    ]
    lags = np.concatenate(list(map(_greedy_lags, runs, expected)))
    oracle = np.concatenate(expected)
    packages = [np.concatenate([run.ways[way] for run in runs]) for way in runs[0].ways]
    return Verification(
        tokens=len(oracle),
        kl=float(np.max([kl_divergence(oracle, package).mean() for package in packages])),
        top1=min(top1_agreement(oracle, package) for package in packages),
        largest_difference=float(np.max([difference.max() for difference, _ in differences])),
        largest_relative_difference=float(np.max([(difference / spread).max() for difference, spread in differences])),
        greedy_agreement=float((lags == 0).mean()),
        greedy_faults=int((lags > 2 * np.repeat(tolerances, [len(run.greedy_ids) for run in runs])).sum()),
        golden=tuple(map(_golden, runs, expected, tolerances)),
    )


def _greedy_lags(run: _Run, reference: Float32Array) -> Float32Array:
    """How far each greedy id's logit is behind the oracle's best, by the oracle; 0 where it is the best; [N]."""
    reference = reference[len(run.prompt_ids) - 1 :]  # [N, V]
    lags: Float32Array = reference.max(axis=-1) - reference[np.arange(len(reference)), run.greedy_ids]
    return lags


def _golden(run: _Run, reference: Float32Array, tolerance: float) -> GoldenPrompt:
    """What the device is to reproduce: only ids that no rounding can turn into others."""
    last = len(run.prompt_ids) - 1
    logits = run.ways["token by token"][last:]  # [N, V], from which the greedy ids were chosen
    second, first = np.partition(logits, -2, axis=-1)[:, -2:].T
    narrow = np.flatnonzero(first - second <= tolerance)
    certain = int(narrow[0]) if len(narrow) else len(logits)
    top = np.argsort(-reference[last], kind="stable")[:TOP_LOGITS]
    return GoldenPrompt(
        prompt_ids=tuple(run.prompt_ids.tolist()),
        top_ids=tuple(top.tolist()),
        oracle_logits=tuple(reference[last, top].tolist()),
        package_logits=tuple(logits[0, top].tolist()),
        greedy_ids=tuple(run.greedy_ids[:certain].tolist()),
        tolerance=tolerance,
    )
