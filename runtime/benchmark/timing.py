"""One run of a workload, with the clock outside the calls that an application makes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..request import LogitsProcessor
from ..sampling import SamplingOptions
from ..text_generator import TextGenerator

GREEDY = SamplingOptions.greedy()

DEFINITIONS = """\
ttft_ms      time to first token: from the call with the text, tokenisation included, to the first text that is not
             empty; in a batch, to the first text of every prompt
ttft_ids_ms  the same from token ids to the first token id: what engines that take ids are compared by
itl_ms       inter-token latency: every gap between one token and the next, of all runs
tpot_ms      time per output token: from a run's first token to its last, divided by the gaps between them
e2el_ms      from the call with the text to the last token
             (mean, std, p50, p90, p95, p99, min, max: over runs, and over all gaps of all runs for itl_ms)
prefill_tokens_per_s   tokens of all prompts of a run / median ttft_ids_ms
decode_tokens_per_s    prompts of the batch / median tpot_ms
load_ms      TextGenerator.load, libraries imported before; warm: the files are in the page cache. load_cold_ms:
             after the page cache has dropped them (posix_fadvise; where mincore finds more than 5% still there, no cold
             figure is given). A disk's or a hypervisor's own cache is beyond reach, and may still be warm
peak_rss_bytes         highest resident memory of the process that runs this package, during the row's runs
load_peak_rss_bytes    the same, until the package was open
disk_bytes   all files of the package
bytes_per_step         the least that a decode step must read: all weights but tables that rows are picked from, and
             keys and values of all prompts at the mean length
memory_gb_per_s        what this machine reads of so much memory with as many threads: the best of several passes of
             numpy over a buffer of that size, before and after the runs
share_of_achievable    bytes_per_step / median itl_ms / memory_gb_per_s: 1 is the limit of plain decoding
prediction   median itl_ms = base + per_cached_token x tokens in the cache, all prompts + per_prompt x batch, fitted to
             every gap; the range is a 95% bootstrap over runs, widened by how far the fit misses its own cases
comparison   ratio of the runs' median gaps, and of ttft_ids_ms. Beside a package: by rounds that alternate, behind
             several loads of both; with a report: of medians, normalised by memory_gb_per_s and by multiply_gflops.
             Slower or faster: the bootstrap confidence interval is beyond the tolerance. With several rows and figures
             the confidence of each is raised (Bonferroni)
"""


@dataclass(frozen=True, slots=True)
class RunTimes:
    """One run; all times in milliseconds."""

    prompt_tokens: tuple[int, ...]  # of each prompt
    ttft_ms: float
    ttft_ids_ms: float
    itl_ms: tuple[float, ...]  # [new tokens - 1]
    e2el_ms: float


def time_run(
    generator: TextGenerator,
    texts: Sequence[str],
    *,
    new_tokens: int,
    logits_processor: LogitsProcessor | None = None,
) -> RunTimes:
    """Continue some texts together, greedily, by exactly `new_tokens` tokens each.

    Raises:
        RequestError: they do not fit the context.
    """
    clock = time.perf_counter
    called = clock()
    ids = [generator.tokenizer.encode(text) for text in texts]
    encoded = clock()
    steps = generator.steps(
        ids,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        sampling=GREEDY,
        logits_processor=logits_processor,
    )
    decoders = [generator.tokenizer.stream() for _ in texts]
    silent = set(range(len(texts)))
    marks: list[float] = []
    first_text = None
    for chosen in steps:
        marks.append(clock())
        silent.difference_update([row for row, token_id in chosen.items() if decoders[row].push(token_id)])
        if first_text is None and not silent:
            first_text = clock()
    ended = clock()
    return RunTimes(
        prompt_tokens=tuple(max(1, len(row)) for row in ids),  # an empty prompt is one end-of-text
        ttft_ms=((first_text or ended) - called) * 1e3,
        ttft_ids_ms=(marks[0] - encoded) * 1e3,
        itl_ms=tuple((after - before) * 1e3 for before, after in pairwise(marks)),
        e2el_ms=(ended - called) * 1e3,
    )
