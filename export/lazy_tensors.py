"""Tensors that are read when they are asked for: whether there is one, and how many there are, is told without."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class LazyTensors(Mapping[str, T]):
    """Names of tensors; a subclass says in `__getitem__` how one is read. Mapping's own `in` would read it."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
