"""How finely an int8 graph rounds what it multiplies its weights by: 8 bits, or 7 where 8 would be computed wrongly.

Processors without an instruction for it multiply bytes by adding pairs of products in 16 bits, and 2 x 255 x 127 does
not fit. 2 x 127 x 127 does: with activations of 0 to 127 the same weights give exact sums there. So the graph names the
four constants that say how a row becomes bytes, and a session overrides them where the processor asks for it.

Source: Intel, Optimization Reference Manual, on VPMADDUBSW, which saturates, and VPDPBUSD (VNNI), which does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

STEP, ZERO = "constant/activation/step", "constant/activation/zero"
"""Names of initializers: a row divided by its peak is rounded to multiples of the step, and 0 becomes this byte."""

ONE_SIDED_STEP, ONE_SIDED_ZERO = "constant/activation/one_sided_step", "constant/activation/one_sided_zero"
"""Likewise where inputs are hardly ever negative, as behind an activation function."""

NARROW_RECIPE = "activations"
"""Stands in the recipe of a package that was converted, and so verified, with narrow activations."""


@dataclass(frozen=True, slots=True)
class Activations:
    """The bytes that a row is rounded to."""

    zero: int
    steps: int  # from zero to the largest byte, or one less
    one_sided_zero: int
    one_sided_steps: int

    @property
    def bits(self) -> int:
        return (self.zero + self.steps).bit_length()

    def values(self) -> dict[str, Any]:
        """The constants by their names: scalars, float32 and uint8."""
        return {
            STEP: np.float32(1 / self.steps),
            ZERO: np.uint8(self.zero),
            ONE_SIDED_STEP: np.float32(1 / self.one_sided_steps),
            ONE_SIDED_ZERO: np.uint8(self.one_sided_zero),
        }


WIDE = Activations(zero=128, steps=127, one_sided_zero=32, one_sided_steps=223)
NARROW = Activations(zero=64, steps=63, one_sided_zero=16, one_sided_steps=111)
