"""A device, and which one of several: "cpu", "cuda", "cuda:1"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from .errors import RequestError
from .package import Device


@dataclass(frozen=True, slots=True)
class Place:
    """Where a session runs; the second GPU is Place("cuda", 1)."""

    device: Device = "cpu"
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Place:
        """Read what `str` writes.

        Raises:
            RequestError: no device, or no number behind the colon.
        """
        name, colon, number = text.partition(":")
        for device in get_args(Device):
            is_index = number.isascii() and number.isdecimal() and device != "cpu"
            if name == device and is_index == bool(colon):
                return cls(device, int(number) if colon else 0)
        raise RequestError(f"device {text!r}, expected cpu, cuda, tensorrt, or the second GPU: cuda:1, tensorrt:1")

    def __str__(self) -> str:
        return f"{self.device}:{self.index}" if self.index else self.device


CPU = Place()
