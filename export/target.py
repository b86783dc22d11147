"""What a checkpoint can be converted to, and what that asks of the machine that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantization.recipes import Quantized
from runtime.errors import RequestError
from runtime.package import Attention, CacheType, Device, Needs, Precision

PRECISIONS: Mapping[Device, tuple[Precision, ...]] = {
    "cpu": ("int8", "fp32", "int4"),
    "cuda": ("fp16", "int8", "int4"),
    "tensorrt": ("fp16", "int8"),
}
"""What is made for a device, the default first."""

CACHES: Mapping[Device, tuple[CacheType, ...]] = {
    "cpu": ("float32", "int8"),
    "cuda": ("float16",),
    "tensorrt": ("float16",),
}
"""What keys and values may be, likewise. onnxruntime's CUDA attention reads int8 ones fast only where 4 query heads or
more share a key, and GPT-2's never do."""

QUANTIZED: Mapping[tuple[Device, Precision], Quantized] = {
    ("cpu", "int8"): "int8",
    ("cpu", "int4"): "int4",
    ("cuda", "int8"): "int8-weights",
    ("cuda", "int4"): "int4-weights",
    ("tensorrt", "int8"): "int8-static",
}
"""What a precision means on a device, where it quantizes."""

RECIPES: Mapping[tuple[Device, Precision], str] = {
    ("cpu", "fp32"): "weights as in the checkpoint",
    ("cpu", "int8"): "weights int8, one scale per output column; activations uint8, one scale per token; embedding and "
    "head 8-bit in blocks",
    ("cpu", "int4"): "weights 4-bit in blocks, embedding and head too; activations 8-bit in blocks",
    ("cuda", "fp16"): "weights and activations float16",
    ("cuda", "int8"): "weights 8-bit in blocks, embedding and head too; activations float16",
    ("cuda", "int4"): "weights 4-bit in blocks, embedding and head too; activations float16",
    ("tensorrt", "fp16"): "weights and activations float16",
    ("tensorrt", "int8"): "weights int8, one scale per output column; what they multiply int8, one scale per matrix; "
    "embedding, head and all else float16",
}

CACHE_RECIPES: Mapping[CacheType, str] = {
    "float32": "keys and values float32",
    "float16": "keys and values float16",
    "int8": "keys and values int8, one scale per channel",
}

OLDEST_ONNXRUNTIME: Mapping[tuple[Device, Precision], str] = {
    ("cpu", "fp32"): "1.22.1",
    ("cpu", "int8"): "1.22.1",
    ("cpu", "int4"): "1.22.1",
    ("cuda", "fp16"): "1.31.1",
    ("cuda", "int8"): "1.31.1",
    ("cuda", "int4"): "1.31.1",
    ("tensorrt", "fp16"): "1.31.1",
    ("tensorrt", "int8"): "1.31.1",
}
"""The oldest versions that were tried. For the CPU: those that ran the demo package's golden prompts; older ones lack
attention's bias input. Tried: 1.20.1, 1.21.1, 1.22.1, 1.23.2, 1.24.4, 1.26.0, 1.28.0, 1.32.0 (int8 and int4 with the
embedding of today: 1.22.1, 1.23.2, 1.32.0). For the others, of onnxruntime-gpu: the one whose kernels the graph was
laid out for."""

OLDEST_WITH_INT8_CACHE = "1.32.0"
"""No older one was tried."""

INT8_FEATURES = ("avx512_vnni", "avx_vnni", "asimddp")
"""Linux's names of processor features, any of which multiplies uint8 by int8 without saturating at 16 bits."""


@dataclass(frozen=True, slots=True)
class Target:
    """A device, and how numbers are stored for it.

    Raises:
        RequestError: nothing like it is made; says what is.
    """

    device: Device
    precision: Precision
    kv_cache: CacheType

    def __post_init__(self) -> None:
        precisions, caches = PRECISIONS[self.device], CACHES[self.device]
        if self.precision not in precisions:
            raise RequestError(
                f"no {self.precision} packages are made for {self.device}, expected one of {', '.join(precisions)}"
            )
        if self.kv_cache not in caches:
            raise RequestError(
                f"keys and values cannot be {self.kv_cache} on {self.device}, expected {' or '.join(caches)}; leave "
                "--kv-cache out"
            )

    @classmethod
    def of(cls, device: Device, precision: Precision | None, kv_cache: CacheType | None) -> Target:
        """The same, with the device's default where one is None."""
        return cls(device, precision or PRECISIONS[device][0], kv_cache or CACHES[device][0])

    @property
    def quantized(self) -> Quantized | None:
        """The recipe of the matrices; None where they keep the checkpoint's numbers."""
        return QUANTIZED.get((self.device, self.precision))

    @property
    def suffix(self) -> str:
        """What tells a package from others of the same checkpoint: int8, int8-kv8, fp16-cuda."""
        cache = "-kv8" if self.kv_cache == "int8" else ""
        return f"{self.precision}{cache}" + ("" if self.device == "cpu" else f"-{self.device}")

    def attention(self, on_cpu: Attention) -> Attention:
        """What the graph does with keys and values; `on_cpu` says what that of the CPU does."""
        return "plain" if self.device == "tensorrt" else on_cpu

    def recipe(self) -> dict[str, str]:
        """How numbers are stored, in words."""
        recipe = {"weights": RECIPES[self.device, self.precision], "cache": CACHE_RECIPES[self.kv_cache]}
        if self.device != "cpu":
            recipe["verified"] = f"verified on onnxruntime's CPU provider, not on {self.device}: verify it there"
        return recipe

    def needs(self) -> Needs:
        """What the package asks of the machine."""
        integer = (self.device, self.precision) == ("cpu", "int8")
        oldest = OLDEST_ONNXRUNTIME[self.device, self.precision]
        return Needs(
            onnxruntime=OLDEST_WITH_INT8_CACHE if self.kv_cache == "int8" else oldest,
            processor=INT8_FEATURES if integer else (),
            narrows=integer,
        )
