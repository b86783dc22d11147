"""What a checkpoint can be converted to."""

from __future__ import annotations

import pytest

from export.target import CACHES, OLDEST_ONNXRUNTIME, PRECISIONS, RECIPES, Target
from runtime.errors import RequestError
from runtime.package import CacheType, Device, Precision


@pytest.mark.parametrize(
    ("device", "precision", "cache", "suffix"),
    [
        ("cpu", None, None, "int8"),
        ("cpu", "int4", "int8", "int4-kv8"),
        ("cuda", None, None, "fp16-cuda"),
        ("cuda", "int4", "float16", "int4-cuda"),
        ("tensorrt", None, None, "fp16-tensorrt"),
    ],
)
def test_a_device_has_its_defaults_and_a_suffix(
    device: Device, precision: Precision | None, cache: CacheType | None, suffix: str
) -> None:
    assert Target.of(device, precision, cache).suffix == suffix


@pytest.mark.parametrize(
    ("device", "precision", "cache", "message"),
    [
        ("cuda", "fp32", None, "no fp32 packages are made for cuda, expected one of fp16, int8, int4"),
        ("tensorrt", "int4", None, "no int4 packages are made for tensorrt, expected one of fp16, int8"),
        ("cuda", "fp16", "int8", "keys and values cannot be int8 on cuda, expected float16; leave --kv-cache out"),
        ("cuda", "fp16", "float32", "keys and values cannot be float32 on cuda"),
    ],
)
def test_what_is_not_made_is_refused(
    device: Device, precision: Precision, cache: CacheType | None, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        Target.of(device, precision, cache)


def test_every_target_says_how_numbers_are_stored_and_what_it_needs() -> None:
    made = {(device, precision) for device, precisions in PRECISIONS.items() for precision in precisions}
    assert made == set(RECIPES) == set(OLDEST_ONNXRUNTIME)
    for device, precision in made:
        for cache in CACHES[device]:
            target = Target(device, precision, cache)
            assert ("verified" in target.recipe()) == (device != "cpu")
            assert target.needs().narrows == (device == "cpu" and precision == "int8")
