"""What the writers of float16 graphs share: how they look tensors up, and the type of the sum through all layers."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from runtime.config import GPT2Config
from runtime.package import Device, Precision

from .half_products import DEVICE_PRODUCTS, as_half
from .onnx_builder import GraphBuilder, WeightsFile
from .products import Tensors


class HalfWriter:
    """A graph so far. Each method appends a part and returns its result's name, float16 where nothing is said."""

    device: Device

    def __init__(
        self, config: GPT2Config, tensors: Tensors, precision: Precision, weights: WeightsFile, *, wide_residual: bool
    ) -> None:
        """`wide_residual` keeps the sum that goes through all layers in float32."""
        self._config = config
        self._tensors = tensors
        self._products = DEVICE_PRODUCTS[self.device, precision]
        self._graph = GraphBuilder(weights)
        self._wide = wide_residual

    def _product(self, name: str, x: str) -> str:
        return self._products.linear(self._graph, f"{name}.weight", x, self._tensors[f"{name}.weight"])

    def _half(self, name: str) -> str:
        return self._graph.weight(name, as_half(name, self._plain(name)))

    def _residual(self, x: str) -> str:
        """A float16 value in the type of the residual."""
        return self._graph.node("Cast", [x], f"{x}/wide", to=TensorProto.FLOAT) if self._wide else x

    def _of_residual(self, name: str) -> str:
        """A vector in the type of the residual."""
        return self._graph.weight(name, self._plain(name)) if self._wide else self._half(name)

    def _narrow(self, x: str) -> str:
        """A value in the type of the residual as float16."""
        return self._graph.node("Cast", [x], f"{x}/half", to=TensorProto.FLOAT16) if self._wide else x

    def _plain(self, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        values = self._tensors[name]
        assert isinstance(values, np.ndarray), "only matrices are quantized"
        return values
