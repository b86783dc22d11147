"""Verification: what passes, what does not, and what the golden prompts hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from export.checkpoint import read_checkpoint
from export.graph import build_graph
from export.onnx_builder import WeightsFile
from export.reference import reference_logits
from export.target import PRECISIONS
from export.verification import (
    FP32_TOLERANCE,
    GREEDY_TOKENS,
    MAX_KL,
    PROMPT_TOKENS,
    PROMPTS,
    REPLAY_FLOOR,
    TOP_LOGITS,
    Verification,
    check,
    prompt_ids,
    verify_decoder,
)
from runtime.config import GPT2Config
from runtime.decoder import Decoder
from runtime.errors import VerificationError
from runtime.package import Precision
from runtime.text_generator import TextGenerator
from runtime.tokenizer import Tokenizer
from runtime.verify import replay
from tests.tiny import tiny_weights

FP32_ERROR = 1e-5
"""Of an fp32 logit, in standard deviations of its position's. Measured: 2e-6."""

Tensors = Mapping[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def tokenizer(tiny_fp32: Path) -> Tokenizer:
    return TextGenerator.load(tiny_fp32).tokenizer


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> GPT2Config:
    return read_checkpoint(tiny_checkpoint).config


def decoder_of(folder: Path, config: GPT2Config, tensors: Tensors, precision: Precision = "fp32") -> Decoder:
    with (folder / "model.onnx_data").open("wb") as file:
        model = build_graph(config, tensors, precision, WeightsFile(file, "model.onnx_data"))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return Decoder.open(folder / "model.onnx", config)


def verification(kl: float = 0.0, relative: float = 0.0, greedy: float = 1.0, faults: int = 0) -> Verification:
    return Verification(
        tokens=1,
        kl=kl,
        top1=1.0,
        largest_difference=0.0,
        largest_relative_difference=relative,
        greedy_agreement=greedy,
        greedy_faults=faults,
        golden=(),
    )


# The model itself


def test_a_right_fp32_graph_passes(tmp_path: Path, config: GPT2Config, tokenizer: Tokenizer) -> None:
    tensors = tiny_weights(config)
    measured = verify_decoder(decoder_of(tmp_path, config, tensors), tokenizer, tensors, "fp32")
    check(measured, "fp32")
    assert measured.largest_relative_difference <= FP32_ERROR
    assert measured.top1 == measured.greedy_agreement == 1
    assert measured.greedy_faults == 0


@pytest.mark.parametrize(
    "change",
    [
        {"layer_norm_epsilon": 1e-3},
        {"activation": "gelu"},
        {"activation": "silu"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
    ids=str,
)
def test_a_graph_of_another_config_is_caught(
    tmp_path: Path, config: GPT2Config, tokenizer: Tokenizer, change: dict[str, object]
) -> None:
    """The graph is right, but of another model than the oracle's."""
    tensors = tiny_weights(config)
    decoder = decoder_of(tmp_path, replace(config, **change), tensors)  # type: ignore[arg-type]
    decoder.config = config
    with pytest.raises(VerificationError, match=r"^the fp32 graph is not the model: its logits differ .* by up to "):
        check(verify_decoder(decoder, tokenizer, tensors, "fp32"), "fp32")


@pytest.mark.parametrize("precision", PRECISIONS["cpu"])
def test_a_graph_of_other_weights_is_caught(
    tmp_path: Path, config: GPT2Config, tokenizer: Tokenizer, precision: Precision
) -> None:
    decoder = decoder_of(tmp_path, config, tiny_weights(config), precision)
    measured = verify_decoder(decoder, tokenizer, tiny_weights(config, seed=1), precision)
    with pytest.raises(VerificationError, match=r"is not the model|loses too much"):
        check(measured, precision)


def test_one_wrong_weight_in_one_prompt_is_caught(tmp_path: Path, config: GPT2Config, tokenizer: Tokenizer) -> None:
    """A NaN, in the embedding of a letter that the first prompts lack: no maximum may pass it over."""
    config = replace(config, tie_word_embeddings=False)
    tensors = tiny_weights(config)
    prompts = [set(prompt_ids(text, tokenizer, config).tolist()) for text in PROMPTS]
    damaged = tensors | {"wte.weight": tensors["wte.weight"].copy()}
    damaged["wte.weight"][min(prompts[2] - prompts[0] - prompts[1])] = np.nan
    measured = verify_decoder(decoder_of(tmp_path, config, damaged), tokenizer, tensors, "fp32")
    assert np.isnan(measured.largest_difference)
    assert np.isnan(measured.largest_relative_difference)
    assert np.isnan(measured.kl)
    for precision in get_args(Precision):
        with pytest.raises(VerificationError):
            check(measured, precision, allow_loss=True)


def test_a_model_of_zeros_is_itself(tmp_path: Path, config: GPT2Config, tokenizer: Tokenizer) -> None:
    """All logits are equal: there is no spread to measure a difference in."""
    zeros = {name: np.zeros_like(values) for name, values in tiny_weights(config).items()}
    for precision in PRECISIONS["cpu"]:
        check(verify_decoder(decoder_of(tmp_path, config, zeros, precision), tokenizer, zeros, precision), precision)


# The bars


@pytest.mark.parametrize(
    ("precision", "passes"),
    [
        ("fp32", verification(relative=FP32_TOLERANCE)),
        ("int8", verification(kl=MAX_KL["int8"])),
        ("int8", verification(relative=1.0, greedy=0.5)),
        ("int4", verification(kl=MAX_KL["int4"])),
        ("fp16", verification(kl=MAX_KL["fp16"])),
    ],
)
def test_the_bars_are_inclusive(precision: Precision, passes: Verification) -> None:
    check(passes, precision)


@pytest.mark.parametrize(
    ("precision", "fails", "message"),
    [
        ("fp32", verification(relative=2 * FP32_TOLERANCE), "up to 0.002 standard deviations, expected at most 0.001"),
        ("fp32", verification(relative=float("nan")), "up to nan standard deviations"),
        ("fp32", verification(greedy=0.5, faults=8), "50.0% of its greedy ids agree"),
        ("int8", verification(kl=0.03), "KL 0.0300 nats a token, expected at most 0.02; convert with --precision fp32"),
        ("int8", verification(kl=float("nan")), "KL nan nats a token"),
        (
            "int4",
            verification(kl=0.2),
            "int4 loses too much on this model: KL 0.2000 nats a token, expected at most 0.1;",
        ),
    ],
)
def test_beyond_the_bars_is_refused(precision: Precision, fails: Verification, message: str) -> None:
    with pytest.raises(VerificationError) as caught:
        check(fails, precision)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loss_is_allowed_on_request_but_not_a_nan() -> None:
    check(verification(kl=5.0), "int8", allow_loss=True)
    for precision, fails in [("int8", verification(kl=float("nan"))), ("fp32", verification(relative=1.0))]:
        with pytest.raises(VerificationError):
            check(fails, precision, allow_loss=True)  # type: ignore[arg-type]


# Prompts


@pytest.mark.parametrize(("n_ctx", "expected"), [(1, 1), (16, 1), (17, 1), (20, 4), (80, 64), (1024, 64)])
def test_a_prompt_is_cut_so_that_its_continuation_fits(
    config: GPT2Config, tokenizer: Tokenizer, n_ctx: int, expected: int
) -> None:
    assert len(prompt_ids(PROMPTS[1], tokenizer, replace(config, n_ctx=n_ctx))) == expected
    assert len(prompt_ids("", tokenizer, config)) == 1
    assert PROMPT_TOKENS == 64


@pytest.mark.parametrize("n_ctx", [2, 15, 16, 17, 33])
def test_a_short_context_is_verified_to_its_end(
    tmp_path: Path, config: GPT2Config, tokenizer: Tokenizer, n_ctx: int
) -> None:
    config = replace(config, n_ctx=n_ctx)
    tensors = tiny_weights(config)
    measured = verify_decoder(decoder_of(tmp_path, config, tensors), tokenizer, tensors, "fp32")
    check(measured, "fp32")
    assert max(len(golden.prompt_ids) + len(golden.greedy_ids) for golden in measured.golden) <= n_ctx


def test_progress_counts_prompts_and_layers(tmp_path: Path, config: GPT2Config, tokenizer: Tokenizer) -> None:
    lines: list[str] = []
    tensors = tiny_weights(config)
    verify_decoder(decoder_of(tmp_path, config, tensors), tokenizer, tensors, "fp32", progress=lines.append)
    assert lines[:3] == [f"package: prompt {number} of 3" for number in (1, 2, 3)]
    assert len(lines) == len(PROMPTS) + config.n_layer + 1


# What the package carries


@pytest.mark.parametrize("precision", PRECISIONS["cpu"])
def test_golden_prompts_hold_what_the_oracle_and_the_package_gave(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, precision: Precision
) -> None:
    generator = TextGenerator.load(request.getfixturevalue(f"tiny_{precision}"))
    checkpoint, goldens = read_checkpoint(tiny_checkpoint), generator.package.manifest.golden
    assert len(goldens) == len(PROMPTS)
    for text, golden in zip(PROMPTS, goldens, strict=True):
        prompt = np.array(golden.prompt_ids)
        np.testing.assert_array_equal(prompt, prompt_ids(text, generator.tokenizer, checkpoint.config))
        (expected,) = reference_logits(checkpoint.config, checkpoint.tensors, [prompt])
        top = np.argsort(-expected[-1], kind="stable")[:TOP_LOGITS]
        assert golden.top_ids == tuple(top)
        np.testing.assert_allclose(golden.oracle_logits, expected[-1, top], rtol=1e-6)
        assert golden.tolerance >= REPLAY_FLOOR[precision] * expected[-1].std() * (1 - 1e-6)
        assert len(golden.greedy_ids) <= GREEDY_TOKENS
        assert replay(generator.decoder, golden).held


def test_a_golden_continuation_ends_where_two_ids_are_close(
    tmp_path: Path, config: GPT2Config, tokenizer: Tokenizer
) -> None:
    """Two equal rows of the table have equal logits: whichever wins, no device is held to it."""
    tensors = tiny_weights(config)
    sure = verify_decoder(decoder_of(tmp_path, config, tensors), tokenizer, tensors, "fp32").golden[1]
    first = sure.greedy_ids[0]
    twins = tensors | {"wte.weight": tensors["wte.weight"].copy()}
    unused = next(token for token in range(config.n_vocab) if token not in (*sure.prompt_ids, first))
    twins["wte.weight"][unused] = twins["wte.weight"][first]
    measured = verify_decoder(decoder_of(tmp_path, config, twins), tokenizer, twins, "fp32")
    check(measured, "fp32")
    assert measured.golden[1].greedy_ids == ()
