"""The oracle: laws of a causal language model, agreement with transformers, facts, refusals."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export.reference import ACTIVATIONS, HEAD_ROWS, reference_logits
from runtime.config import Activation, GPT2Config
from runtime.errors import RequestError
from tests.tiny import hugging_face_config, tiny_config, tiny_weights

DEMO_DIR = Path(__file__).parents[1] / "models" / "demo"

ROUNDING = 2.0**-24
"""Relative error of a logit rounded to float32; two rounded logits differ by twice as much."""

FLOAT64_ERROR = 1e-12
"""Absolute error beside that rounding, in logits up to 16. Measured before rounding: against transformers in float64
3e-15 with the tiny models and 6e-14 with the demo checkpoint, between splits of the same work 3e-14. (On the demo
checkpoint, transformers in float32 is 3e-5 off, and this oracle with float32 matrix products would be 2e-5 off.)"""

Logits = NDArray[np.float32]
Tensors = Mapping[str, NDArray[np.float32]]
Peer = Callable[[GPT2Config, Tensors, Sequence[NDArray[np.int64]]], list[NDArray[np.float64]]]


def token_rows(config: GPT2Config, *lengths: int) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, config.n_vocab, length) for length in lengths]


def assert_same(actual: Logits, expected: Logits) -> None:
    np.testing.assert_allclose(actual, expected, rtol=2 * ROUNDING, atol=FLOAT64_ERROR)


# Laws


def test_a_prefix_has_the_first_logits_of_the_whole() -> None:
    config = tiny_config()
    tensors = tiny_weights(config, seed=1)
    (ids,) = token_rows(config, config.n_ctx)
    (whole,) = reference_logits(config, tensors, [ids])
    for length in range(1, config.n_ctx):
        (prefix,) = reference_logits(config, tensors, [ids[:length]])
        assert_same(prefix, whole[:length])


def test_sequences_together_give_what_each_gives_alone() -> None:
    config = tiny_config()
    tensors = tiny_weights(config, seed=2)
    sequences = token_rows(config, 7, 1, config.n_ctx, 7)
    together = reference_logits(config, tensors, sequences)
    assert [logits.shape for logits in together] == [(len(ids), config.n_vocab) for ids in sequences]
    for ids, logits in zip(sequences, together, strict=True):
        assert logits.dtype == np.float32
        (alone,) = reference_logits(config, tensors, [ids])
        assert_same(logits, alone)


def test_no_sequences_give_no_logits() -> None:
    assert reference_logits(tiny_config(), {}, []) == []


@pytest.mark.parametrize(
    ("change", "query_factors"),
    [({"scale_attn_weights": False}, (4.0, 4.0)), ({"scale_attn_by_inverse_layer_idx": True}, (1.0, 0.5))],
    ids=["unscaled", "by layer"],
)
def test_a_scaling_flag_equals_scaled_queries(change: dict[str, bool], query_factors: tuple[float, ...]) -> None:
    config = tiny_config()
    assert config.head_dim == 4.0**2
    tensors = tiny_weights(config, seed=3)
    scaled = {name: array.astype(np.float64) for name, array in tensors.items()}
    for layer, factor in enumerate(query_factors):
        for kind in ("weight", "bias"):
            scaled[f"h.{layer}.attn.c_attn.{kind}"][..., : config.n_embd] *= factor
    (flagged,) = reference_logits(replace(config, **change), tensors, token_rows(config, 9))  # type: ignore[arg-type]
    (default,) = reference_logits(config, scaled, token_rows(config, 9))  # type: ignore[arg-type]
    assert_same(flagged, default)


def test_an_untied_head_that_equals_the_embedding_is_a_tied_one() -> None:
    config = tiny_config()
    tensors = tiny_weights(config, seed=4)
    untied = {**tensors, "lm_head.weight": tensors["wte.weight"]}
    (expected,) = reference_logits(config, tensors, token_rows(config, 5))
    (actual,) = reference_logits(replace(config, tie_word_embeddings=False), untied, token_rows(config, 5))
    np.testing.assert_array_equal(actual, expected)


# How tensors are read


class WatchedTensors(Mapping[str, NDArray[np.float32]]):
    """Fresh copies, as a lazy reader makes them: counts lookups, and sees whether an earlier copy is still held."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self.reads: Counter[str] = Counter()
        self.held: set[str] = set()
        self._given: list[tuple[str, weakref.ref[NDArray[np.float32]]]] = []

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        self.held |= {earlier for earlier, reference in self._given if reference() is not None}
        array: NDArray[np.float32] = self.tensors[name].copy()
        self.reads[name] += 1
        self._given.append((name, weakref.ref(array)))
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.mark.parametrize("tied", [True, False])
def test_each_tensor_is_read_once_and_let_go(tied: bool) -> None:
    config = replace(tiny_config(), tie_word_embeddings=tied)
    watched = WatchedTensors(tiny_weights(config, seed=5))
    reference_logits(config, watched, token_rows(config, 3, 8))
    assert watched.reads == {**dict.fromkeys(watched, 1), "wte.weight": 2 if tied else 1}
    assert not watched.held


def test_progress_names_each_layer_and_the_head() -> None:
    config = tiny_config()
    lines: list[str] = []
    reference_logits(config, tiny_weights(config, seed=6), token_rows(config, 2), lines.append)
    assert lines == ["reference: layer 1 of 2", "reference: layer 2 of 2", "reference: head"]


# Facts


@pytest.mark.parametrize(
    ("activation", "x", "expected"),
    [
        ("gelu_new", 1.0, 0.8411919906082768),
        ("gelu_new", -800.0, 0.0),
        ("gelu", 1.0, 0.8413447460685429),
        ("gelu", -10.0, -7.619853024160527e-23),
        ("relu", 2.5, 2.5),
        ("relu", -2.5, 0.0),
        ("silu", 1.0, 0.7310585786300049),
        ("silu", -800.0, 0.0),
    ],
)
def test_activation(activation: Activation, x: float, expected: float) -> None:
    (actual,) = ACTIVATIONS[activation](np.array([x]))
    assert actual == pytest.approx(expected, rel=1e-14, abs=0)


# Refusals


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], r"sequence 1 has shape \(0,\), expected 1 to 64 token ids"),
        ([0] * 65, r"sequence 1 has shape \(65,\), expected 1 to 64 token ids"),
        ([[0, 1]], r"sequence 1 has shape \(1, 2\), expected 1 to 64 token ids"),
        ([0, 1, 131], "sequence 1 has id 131 at 2, expected 0 to 130"),
        ([0, -1, 2], "sequence 1 has id -1 at 1, expected 0 to 130"),
    ],
    ids=["empty", "too long", "two rows", "unknown id", "negative id"],
)
def test_a_sequence_is_refused(ids: list[int], message: str) -> None:
    good = np.array([0, 130], dtype=np.int64)
    with pytest.raises(RequestError, match=message):
        reference_logits(tiny_config(), {}, [good, np.array(ids, dtype=np.int64)])


def test_all_bad_sequences_are_named_in_one_line() -> None:
    bad = [np.array([131]), np.zeros(0, dtype=np.int64)]
    with pytest.raises(RequestError, match=r"^reference logits: sequence 0 .*; sequence 1 .*$"):
        reference_logits(tiny_config(), {}, bad)


# Against transformers


@pytest.fixture(scope="module")
def transformers_logits() -> Peer:
    """The same computation in float64 by transformers' GPT2LMHeadModel, one sequence at a time."""
    reason = "transformers and torch are the peer that the oracle is compared with"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)

    def logits(
        config: GPT2Config, tensors: Tensors, sequences: Sequence[NDArray[np.int64]]
    ) -> list[NDArray[np.float64]]:
        model = transformers.GPT2LMHeadModel(
            # 4.57.6 reads the scaling flags in the eager implementation only
            transformers.GPT2Config(**hugging_face_config(config), attn_implementation="eager")
        )
        state = {f"transformer.{name}": torch.from_numpy(array) for name, array in tensors.items()}
        state["lm_head.weight"] = state.pop("transformer.lm_head.weight", state["transformer.wte.weight"])
        model.double().eval().load_state_dict(state)
        with torch.no_grad():
            return [model(torch.from_numpy(ids)[None]).logits[0].numpy() for ids in sequences]

    return logits


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"activation": "gelu"},
        {"activation": "relu"},
        {"activation": "silu"},
        {"n_inner": 24},
        {"n_head": 1},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
        {"layer_norm_epsilon": 0.1},
        {"n_vocab": HEAD_ROWS + 1},
    ],
    ids=str,
)
def test_equals_transformers(change: dict[str, object], transformers_logits: Peer) -> None:
    config = replace(tiny_config(), **change)  # type: ignore[arg-type]
    tensors = tiny_weights(config, seed=7)
    sequences = token_rows(config, 1, 11, config.n_ctx)
    actual = reference_logits(config, tensors, sequences)
    for ours, theirs in zip(actual, transformers_logits(config, tensors, sequences), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=ROUNDING, atol=FLOAT64_ERROR)


# The demo checkpoint: trained weights


def read_demo() -> tuple[GPT2Config, dict[str, NDArray[np.float32]]]:
    """The checkpoint without our own reader: an 8-byte length, a JSON header, then the fp16 arrays."""
    values = json.loads((DEMO_DIR / "config.json").read_text(encoding="utf-8"))
    config = GPT2Config(
        **{name: values[name] for name in ("n_layer", "n_head", "n_embd", "n_ctx", "eos_token_id")},
        n_vocab=values["vocab_size"],
        n_inner=4 * values["n_embd"],
        activation=values["activation_function"],
        layer_norm_epsilon=values["layer_norm_epsilon"],
    )
    content = (DEMO_DIR / "model.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:header_end])
    header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F16"
        start, end = (header_end + offset for offset in entry["data_offsets"])
        array = np.frombuffer(content[start:end], dtype="<f2").reshape(entry["shape"])
        tensors[name.removeprefix("transformer.")] = array.astype(np.float32)
    return config, tensors


def test_demo_predicts_what_it_did() -> None:
    """Recorded when transformers agreed, so that a machine without torch compares with it too."""
    config, tensors = read_demo()
    (logits,) = reference_logits(config, tensors, [np.arange(100, 120)])
    best = np.argsort(-logits[-1])[:5]
    assert best.tolist() == [123, 117, 138, 109, 83]
    recorded = np.array([10.238904, 9.176152, 8.749252, 8.599350, 8.575828])
    np.testing.assert_allclose(logits[-1, best], recorded, rtol=0, atol=6e-7)  # half the last digit, and rounding


def test_demo_equals_transformers(transformers_logits: Peer) -> None:
    config, tensors = read_demo()
    sequences = token_rows(config, 3, 100)
    actual = reference_logits(config, tensors, sequences)
    for ours, theirs in zip(actual, transformers_logits(config, tensors, sequences), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=ROUNDING, atol=FLOAT64_ERROR)
