"""The fingerprint of weights that stream past."""

from __future__ import annotations

import hashlib

import numpy as np

from export.fingerprint import FingerprintedTensors
from tests.tiny import tiny_config, tiny_weights

WEIGHTS = tiny_weights(tiny_config())


def fingerprint(weights: dict[str, np.ndarray], names: list[str]) -> str:
    tensors = FingerprintedTensors(weights, lambda _done: None)
    for name in names:
        tensors[name]
    return tensors.fingerprint()


def test_is_the_sha256_of_names_and_values() -> None:
    weights = {"b": np.array([1, 2], np.float32), "a": np.array([[3]], np.float32)}
    digest_a = hashlib.sha256(bytes.fromhex("00004040")).digest()
    digest_b = hashlib.sha256(bytes.fromhex("0000803f00000040")).digest()
    expected = hashlib.sha256(b"a\0" + digest_a + b"b\0" + digest_b).hexdigest()
    assert fingerprint(weights, ["b", "a"]) == expected


def test_does_not_depend_on_the_order_or_on_looking_twice() -> None:
    names = list(WEIGHTS)
    assert fingerprint(WEIGHTS, names) == fingerprint(WEIGHTS, [*reversed(names), *names])


def test_depends_on_every_value_and_name() -> None:
    names = list(WEIGHTS)
    changed = {name: values.copy() for name, values in WEIGHTS.items()}
    changed[names[-1]].flat[-1] += np.float32(1e-6)
    swapped = WEIGHTS | {names[2]: WEIGHTS[names[3]], names[3]: WEIGHTS[names[2]]}
    assert len({fingerprint(weights, names) for weights in (WEIGHTS, changed, swapped)}) == 3


def test_passes_look_ups_on_and_counts_each_parameter_once() -> None:
    seen: list[int] = []
    tensors = FingerprintedTensors(WEIGHTS, seen.append)
    assert list(tensors) == list(WEIGHTS)
    assert len(tensors) == len(WEIGHTS)
    for name in [*WEIGHTS, "wte.weight"]:
        assert tensors[name] is WEIGHTS[name]
    assert seen[-1] == tiny_config().parameter_count
    assert seen == sorted(set(seen))
