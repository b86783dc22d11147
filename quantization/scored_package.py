"""A loaded package that is being judged: it keeps time, and refuses logits that are no numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.benchmark.machine import peak_rss_bytes
from runtime.errors import PackageError
from runtime.package import WEIGHTS_SUFFIX, Manifest
from runtime.text_generator import TextGenerator

Progress = Callable[[str, int, int], None]
"""(what is done, steps done, steps in all)"""

Float32Array = NDArray[np.float32]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a package takes, to be read beside its quality.

    Beside other packages in one process a small model is slow: their threads wait actively for a while. The demo runs
    at half its speed there (int8 6,900 tokens/s against 14,700 alone).
    """

    bytes: int  # of the package's files
    bits_per_weight: float  # of the weights file, over the model's parameters
    tokens_per_s: float  # that were run while scoring, in pieces, all logits kept: a prompt's speed, not writing's
    peak_rss_bytes: int | None  # of this process since its start; None where it has other packages, or nobody tells


class ScoredPackage:
    """A package, loaded, and the time that it has spent in its model."""

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        """Load it; errors as `TextGenerator.load`."""
        self.folder = folder
        self.generator = TextGenerator.load(folder, threads=threads)
        self.tokens_run = 0
        self.seconds = 0.0

    @property
    def manifest(self) -> Manifest:
        return self.generator.package.manifest

    def logits(self, ids: Int64Array, *, where: str) -> Iterator[Float32Array]:
        """`Decoder.logits`, timed and checked; arguments and errors as `watched`."""
        return self.watched(self.generator.decoder.logits(ids), n_tokens=len(ids), where=where)

    def watched(self, pieces: Iterator[Float32Array], *, n_tokens: int, where: str) -> Iterator[Float32Array]:
        """Pass on pieces of logits as the model gives them.

        Args:
            pieces: [S, V] float32 each, of this package's decoder.
            n_tokens: tokens that are run for all of them.
            where: what is run, for the message.
        Raises:
            PackageError: a logit is NaN or infinite.
        """
        while True:
            started = time.perf_counter()
            logits = next(pieces, None)
            self.seconds += time.perf_counter() - started
            if logits is None:
                break
            if not np.isfinite(logits).all():
                raise PackageError(
                    f"{self.folder}: its logits are NaN or infinite in {where}; python -m runtime.verify {self.folder} "
                    "--full tells if the package was damaged, else convert the checkpoint again"
                )
            yield logits
        self.tokens_run += n_tokens

    def cost(self, *, alone: bool) -> Cost:
        """What it has taken so far; `alone` says that this process has loaded no other package."""
        sizes = {name: entry.bytes for name, entry in self.manifest.files.items()}
        weights = sum(size for name, size in sizes.items() if name.endswith(WEIGHTS_SUFFIX))
        return Cost(
            bytes=sum(sizes.values()),
            bits_per_weight=weights * 8 / self.manifest.config.parameter_count,
            tokens_per_s=self.tokens_run / self.seconds,
            peak_rss_bytes=peak_rss_bytes() if alone else None,
        )
