"""Whether float16, which ends at 65,504, holds what a model computes: the oracle is asked for its largest numbers.

GPT-2's residual grows to thousands at the first token and at marks of punctuation, in a few channels. The sum that goes
through all layers may be kept in float32; nothing else may, so that a model whose other numbers are as large is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.config import GPT2Config
from runtime.errors import QuantizationError

from .checkpoint_files import Float32Array
from .half_products import HALF_MAX
from .reference import RESIDUAL, reference_logits

HEADROOM = 4.0
"""How much larger a number may become on other text than on the text that was measured."""


@dataclass(frozen=True, slots=True)
class HalfRange:
    """The largest magnitudes that were met, by the oracle's names, and the number of tokens that were run."""

    peaks: Mapping[str, float]
    tokens: int

    @property
    def wide_residual(self) -> bool:
        """Whether the sum through all layers has to be float32."""
        return not self.peaks[RESIDUAL] * HEADROOM <= HALF_MAX

    def recipe(self) -> str:
        """What was found and decided, in words."""
        found = ", ".join(f"{name} {peak:.3g}" for name, peak in self.peaks.items())
        kept = "float32" if self.wide_residual else "float16"
        return f"largest magnitudes over {self.tokens} tokens: {found}; residual kept in {kept}"


def measure_range(
    config: GPT2Config, tensors: Mapping[str, Float32Array], sequences: Sequence[NDArray[np.int64]]
) -> HalfRange:
    """Run the oracle on some text.

    Raises:
        QuantizationError: what the residual is made of may overflow too.
    """
    peaks: dict[str, float] = {}

    def watch(name: str, values: NDArray[np.float64]) -> None:
        peaks[name] = max(peaks.get(name, 0.0), float(np.abs(values).max()))

    reference_logits(config, tensors, sequences, watch=watch)
    beyond = [
        f"{name} {peak:.3g}" for name, peak in peaks.items() if name != RESIDUAL and not peak * HEADROOM <= HALF_MAX
    ]
    if beyond:
        raise QuantizationError(
            f"float16 does not hold what this model computes: {', '.join(beyond)}, expected at most "
            f"{HALF_MAX / HEADROOM:.0f}, a quarter of what float16 holds; convert for the CPU"
        )
    return HalfRange(peaks, sum(map(len, sequences)))
