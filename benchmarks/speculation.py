"""What speculation wins, what it may cost, and whether its predictions come true.

    scripts/bench speculation repeats PACKAGE        prompt lookup, greedily, on texts that go round
    scripts/bench speculation varied PACKAGE         prompt lookup, and a draft that is always wrong; nothing repeats
    scripts/bench speculation draft PACKAGE DRAFT    a package drafts for another, in exact mode, over many texts
    scripts/bench speculation rounding PACKAGE       what a token run alone has other than one run in a piece

The prompts of repeats are what the package wrote greedily behind random ids until it went round; those behind which it
did not are left out, and counted. Plain and speculative texts are written in turns in one process, each text by all
ways, and the medians of their times are told; a speed is the median of the texts' ratios, but for draft that of the
medians. Of repeats and varied, the order is drawn anew each time, and the first round is a warm-up; of draft, all ways
run in the same two sessions, which rest between their runs. Every way keeps what it learns from text to text, as a
loaded package does.
Exit status 3 if a bar does not hold: repeats 3.0 times plain, varied 0.95, texts that are not identical in exact mode,
predictions off by more than 15%.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from quantization.divergence import kl_divergence
from runtime import SamplingOptions, TextGenerator
from runtime.command_line import CommandLineParser, run_command
from runtime.draft_pace import Pace
from runtime.drafts import Choose, Draft, PromptLookup
from runtime.errors import VerificationError
from runtime.sampling import choose_token, random_uniform
from runtime.speculation import Speculation, SpeculationStats, speculative_tokens

REPEATS_BAR = 3.0
VARIED_BAR = 0.95
PREDICTION_BAR = 0.15
DRAFT_TOKENS = 4
GREEDY = SamplingOptions.greedy()
SOUGHT_TOKENS = 400
ROUND_TOKENS = 64
TRIES = 8


class AlwaysWrong:
    """Guesses at every place, without end and without cost, and is never right."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text

    def kind(self, ids: Sequence[int]) -> int | None:
        return 0

    def expected_ms(self, count: int) -> float:
        return 0.0

    def catch_up_ms(self, ids: Sequence[int]) -> float:
        return 0.0

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        places = range(len(ids), len(ids) + count)
        return [self._text[place] ^ 1 if place < len(self._text) else 0 for place in places]


@dataclass(frozen=True)
class Text:
    """What one way of writing gave."""

    ids: list[int]
    ms: float  # of the tokens after the first
    stats: SpeculationStats


def chooser(sampling: SamplingOptions) -> Choose:
    return lambda ids, logits: choose_token(logits, sampling, random_uniform(sampling.seed or 0, 0, len(ids)))


def plain(generator: TextGenerator, prompt: Sequence[int], sampling: SamplingOptions, tokens: int) -> Text:
    choose, ids = chooser(sampling), list(prompt)
    decoding = generator.decoder.start(batch=1, capacity=len(prompt) + tokens)
    ids.append(choose(ids, decoding.prefill(0, np.array(prompt))))
    started = time.perf_counter()
    for _ in range(tokens - 1):
        ids.append(choose(ids, decoding.decode_step(np.array(ids[-1:]))[0]))
    return Text(ids, (time.perf_counter() - started) * 1e3, SpeculationStats())


def speculate(
    generator: TextGenerator,
    prompt: Sequence[int],
    sampling: SamplingOptions,
    tokens: int,
    *,
    pace: Pace,
    draft: Draft | None,
) -> Text:
    decoding = generator.decoder.start(batch=1, capacity=len(prompt) + tokens)
    logits = decoding.prefill(0, np.array(prompt))
    speculation = Speculation(decoding, 0, n_ctx=generator.config.n_ctx, pace=pace, draft=draft)
    new = speculative_tokens(speculation, prompt, logits, chooser(sampling), max_new_tokens=tokens)
    ids = [*prompt, next(new)]
    started = time.perf_counter()
    ids += new
    return Text(ids, (time.perf_counter() - started) * 1e3, speculation.stats)


def random_prompt(generator: TextGenerator, round_number: int, options: argparse.Namespace) -> list[int]:
    ids: list[int] = np.random.default_rng(round_number).integers(0, generator.tokenizer.n_vocab, options.prompt_tokens)
    return [int(token) for token in ids]


def repeating_prompts(generator: TextGenerator, options: argparse.Namespace) -> tuple[list[list[int]], int]:
    """As many as are needed: random ids and what follows greedily until it goes round. Also how many never did.

    Raises:
        VerificationError: too few did.
    """
    room = generator.config.n_ctx - options.prompt_tokens - options.new_tokens
    sought = max(1, min(SOUGHT_TOKENS, room))
    prompts: list[list[int]] = []
    for number in range(TRIES * (1 + options.runs)):
        ids = plain(generator, random_prompt(generator, number, options), GREEDY, sought).ids
        ends = range(options.prompt_tokens + ROUND_TOKENS, len(ids) + 1)
        if end := next((end for end in ends if goes_round(ids[options.prompt_tokens : end])), None):
            prompts.append(ids[:end])
        if len(prompts) == 1 + options.runs:
            return prompts, number + 1 - len(prompts)
    raise VerificationError(
        f"{len(prompts)} of {number + 1} texts went round within {sought} tokens, expected {1 + options.runs}"
    )


def goes_round(ids: Sequence[int]) -> bool:
    """Whether the last tokens say the same thing twice or more often, word for word."""
    tail = ids[-ROUND_TOKENS:]
    return any(tail[period:] == tail[:-period] for period in range(1, ROUND_TOKENS // 2 + 1))


def compare(
    generator: TextGenerator,
    sampling: SamplingOptions,
    prompts: Sequence[Sequence[int]],
    ways: dict[str, tuple[Pace, Callable[[Text], Draft | None]]],
    options: argparse.Namespace,
) -> dict[str, object]:
    """Median ms of each way over all rounds, and its speed against plain steps."""
    ms: dict[str, list[float]] = {name: [] for name in ("plain", *ways)}
    stats = dict.fromkeys(ways, SpeculationStats())
    same = dict.fromkeys(ways, 0)
    order = np.random.default_rng(0)
    generator.decoder.settle()
    for number, prompt in enumerate(prompts):
        reference = plain(generator, prompt, sampling, options.new_tokens)  # not counted: what a draft may look at
        texts: dict[str, Text] = {}
        for name in order.permutation(list(ms)).tolist():  # none is always the one behind the same other
            if name == "plain":
                texts[name] = plain(generator, prompt, sampling, options.new_tokens)
            else:
                pace, draft = ways[name]
                texts[name] = speculate(
                    generator, prompt, sampling, options.new_tokens, pace=pace, draft=draft(reference)
                )
        if number:
            for name, text in texts.items():
                ms[name].append(text.ms)
            for name in ways:
                stats[name] += texts[name].stats
                same[name] += texts[name].ids == reference.ids
    medians = {name: float(np.median(times)) for name, times in ms.items()}
    rows: dict[str, object] = {"plain": {"ms": medians["plain"]}}
    for name in ways:
        ratios = np.divide(ms["plain"], ms[name])
        rows[name] = {
            "ms": medians[name],
            "speed": float(np.median(ratios)),
            "speed_least": float(ratios.min()),
            "same_texts": same[name],
            **described(stats[name]),
        }
    return rows


def described(stats: SpeculationStats) -> dict[str, object]:
    return {
        **{name: value for name, value in asdict(stats).items() if name in ("runs", "tokens", "drafted", "accepted")},
        "acceptance": stats.acceptance,
        "tokens_per_run": stats.tokens_per_run,
        "predicted_tokens_per_s": stats.predicted_tokens_per_ms * 1e3,
        "measured_tokens_per_s": stats.measured_tokens_per_ms * 1e3,
    }


def repeats(options: argparse.Namespace) -> dict[str, object]:
    generator = TextGenerator.load(options.package)
    ways: dict[str, tuple[Pace, Callable[[Text], Draft | None]]] = {
        "lookup": (Pace(), lambda _: PromptLookup()),
        "lookup, exact": (Pace(exact=True), lambda _: PromptLookup()),
    }
    prompts, left_out = repeating_prompts(generator, options)
    rows = compare(generator, GREEDY, prompts, ways, options)
    _hold(rows, "lookup", REPEATS_BAR, options)
    return {"texts": {"went_round": len(prompts), "left_out": left_out}, **rows}


def varied(options: argparse.Namespace) -> dict[str, object]:
    generator = TextGenerator.load(options.package)
    ways: dict[str, tuple[Pace, Callable[[Text], Draft | None]]] = {
        "lookup": (Pace(), lambda _: PromptLookup()),
        "always wrong": (Pace(), lambda text: AlwaysWrong(text.ids)),
        "exact, no draft": (Pace(exact=True), lambda _: None),
        "exact, lookup": (Pace(exact=True), lambda _: PromptLookup()),
    }
    prompts = [random_prompt(generator, number, options) for number in range(1 + options.runs)]
    rows = compare(generator, SamplingOptions(temperature=1.0, top_k=0, seed=1), prompts, ways, options)
    _hold(rows, "lookup", VARIED_BAR, options)
    _hold(rows, "always wrong", VARIED_BAR, options)
    return rows


def draft(options: argparse.Namespace) -> dict[str, object]:
    """Each text in exact mode: without a draft, with guesses of one length, and of a length that adapts."""
    target = TextGenerator.load(options.package, draft=options.draft)
    package = target.draft
    assert package is not None, "it was loaded with one"
    target.decoder.settle()
    package.decoder.settle()
    paces = {"fixed": Pace(exact=True, draft_tokens=DRAFT_TOKENS), "adaptive": Pace(exact=True)}
    totals, same = dict.fromkeys(paces, SpeculationStats()), dict.fromkeys(paces, 0)
    ms: dict[str, list[float]] = {name: [] for name in ("no draft", *paces)}
    for number in range(options.texts):
        prompt = random_prompt(target, number, options)
        sampling = SamplingOptions(seed=number) if number % 2 else GREEDY
        without = speculate(target, prompt, sampling, options.new_tokens, pace=Pace(exact=True), draft=None)
        ms["no draft"].append(without.ms)
        for name, pace in paces.items():
            own = package.for_text(chooser(sampling), capacity=len(prompt) + options.new_tokens)
            text = speculate(target, prompt, sampling, options.new_tokens, pace=pace, draft=own)
            ms[name].append(text.ms)
            totals[name] += text.stats
            same[name] += text.ids == without.ids
    rows: dict[str, object] = {"no draft": {"ms": float(np.median(ms["no draft"]))}}
    for name in paces:
        speed = float(np.median(ms["no draft"]) / np.median(ms[name]))
        row = {"ms": float(np.median(ms[name])), "speed": speed, "same_texts": same[name], **described(totals[name])}
        rows[name] = row
    fixed = totals["fixed"]
    off = fixed.predicted_tokens_per_ms / fixed.measured_tokens_per_ms - 1
    if min(same.values()) < options.texts:
        options.faults.append(f"texts differ in exact mode: {same} of {options.texts} are the same")
    if abs(off) > PREDICTION_BAR:
        options.faults.append(f"the prediction is off by {off:+.1%}, expected at most {PREDICTION_BAR:.0%}")
    return rows


def rounding(options: argparse.Namespace) -> dict[str, object]:
    """KL from logits of pieces to logits of single steps, over texts that the package samples."""
    generator = TextGenerator.load(options.package)
    kl: list[float] = []
    other = 0
    for number in range(options.runs):
        sampling = SamplingOptions(seed=number)
        prompt = [generator.config.eos_token_id]
        ids = plain(generator, prompt, sampling, options.new_tokens).ids
        pieces = np.concatenate([piece.copy() for piece in generator.decoder.logits(np.array(ids))])
        decoding = generator.decoder.start(batch=1, capacity=len(ids))
        steps = np.concatenate([decoding.decode_step(np.array([token])).copy() for token in ids])
        kl += kl_divergence(pieces, steps).tolist()
        other += int((pieces.argmax(axis=1) != steps.argmax(axis=1)).sum())
    return {
        "rounding": {
            "tokens": len(kl),
            "kl_nats_mean": float(np.mean(kl)),
            "kl_nats_max": float(np.max(kl)),
            "other_most_probable": other,
        }
    }


def _hold(rows: dict[str, object], name: str, bar: float, options: argparse.Namespace) -> None:
    row = rows[name]
    assert isinstance(row, dict)
    if row["speed"] < bar:
        options.faults.append(f"{name}: {row['speed']:.3f} times plain, expected at least {bar}")


def report(options: argparse.Namespace) -> int:
    options.faults = []
    rows = options.measure(options)
    receipt = {
        "package": options.package.name,
        "processor": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "onnxruntime": onnxruntime.__version__,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "runs": options.texts if options.measure is draft else options.runs,
    }
    if options.json:
        print(json.dumps({"rows": rows, "receipt": receipt, "faults": options.faults}))
    else:
        print(", ".join(f"{name} {value}" for name, value in receipt.items()))
        for name, row in rows.items():
            print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
    if options.faults:
        raise VerificationError("; ".join(options.faults))
    return 0


def main() -> int:
    parser = CommandLineParser(prog="speculation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("measure", choices=["repeats", "varied", "draft", "rounding"])
    parser.add_argument("package", type=Path)
    parser.add_argument("draft", type=Path, nargs="?", help="the package that drafts")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, help="default 400 for repeats, else 128")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--texts", type=int, default=100, help="of draft")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    options = parser.parse_args()
    if (options.measure == "draft") != (options.draft is not None):
        parser.error("draft takes two packages, the others one")
    options.new_tokens = options.new_tokens or (400 if options.measure == "repeats" else 128)
    measures = {"repeats": repeats, "varied": varied, "draft": draft, "rounding": rounding}
    options.measure = measures[options.measure]
    return run_command(lambda: report(options))


if __name__ == "__main__":
    sys.exit(main())
