"""Places: what is read is what is written, and nothing else is read."""

from __future__ import annotations

import pytest

from runtime.errors import RequestError
from runtime.place import CPU, Place


@pytest.mark.parametrize(
    ("text", "place"),
    [("cpu", CPU), ("cuda", Place("cuda", 0)), ("cuda:1", Place("cuda", 1)), ("tensorrt:12", Place("tensorrt", 12))],
)
def test_a_place_is_read_as_it_is_written(text: str, place: Place) -> None:
    assert Place.parse(text) == place
    assert str(place) == text


def test_the_first_is_the_one_without_a_number() -> None:
    assert Place.parse("cuda:0") == Place.parse("cuda")


@pytest.mark.parametrize(
    "text", ["", "gpu", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "cuda:1:2", "cuda :1", "cuda:²"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="expected cpu, cuda, tensorrt, or the second GPU: cuda:1, tensorrt:1"):
        Place.parse(text)
