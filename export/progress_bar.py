"""A bar on stderr for work that takes long."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


class ProgressBar:
    """The bar on stderr, one for each kind of work; none where stderr is no terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, what: str, done: int, total: int) -> None:
        if self._bar is None or self._bar.desc != what:
            self.__exit__()
            self._bar = tqdm(
                desc=what,
                total=total,
                unit_scale=True,
                disable=None,
                bar_format="{desc} {percentage:3.0f}% {bar} {elapsed}",
            )
            self._bar.desc = what
        self._bar.update(done - self._bar.n)
