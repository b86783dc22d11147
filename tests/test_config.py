"""The numbers of a GPT-2: the official sizes as facts, what contradicts itself as refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runtime.config import OFFICIAL_SIZES, GPT2Config
from runtime.errors import ConfigError

from .tiny import tiny_config, tiny_weights


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("124M", 124_439_808), ("355M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)],
)
def test_official_parameter_counts(size: str, parameters: int) -> None:
    assert OFFICIAL_SIZES[size].parameter_count == parameters


@pytest.mark.parametrize("tied", [True, False])
def test_the_parameter_count_is_what_a_checkpoint_holds(tied: bool) -> None:
    config = replace(tiny_config(), tie_word_embeddings=tied, n_inner=50)
    assert sum(values.size for values in tiny_weights(config).values()) == config.parameter_count


def test_774m_takes_369_kb_of_cache_for_each_token() -> None:
    assert OFFICIAL_SIZES["774M"].cache_items_per_token == 2 * 36 * 1280 == 92_160


def test_heads_are_64_wide_in_every_official_size() -> None:
    assert {config.head_dim for config in OFFICIAL_SIZES.values()} == {64}


def test_attention_is_scaled_by_the_root_of_the_head_dim() -> None:
    assert OFFICIAL_SIZES["124M"].attention_scale(5) == 1 / 8


def test_attention_is_scaled_by_the_layer_too_where_the_model_was_trained_so() -> None:
    config = replace(tiny_config(), scale_attn_by_inverse_layer_idx=True)
    assert config.attention_scale(1) == config.attention_scale(0) / 2 == config.head_dim**-0.5 / 2


def test_attention_is_not_scaled_where_the_model_was_trained_so() -> None:
    assert replace(tiny_config(), scale_attn_weights=False).attention_scale(0) == 1.0


def test_to_dict_and_back_is_the_same_configuration() -> None:
    assert GPT2Config.from_dict(tiny_config().to_dict()) == tiny_config()


def test_unknown_and_missing_fields_are_named() -> None:
    values = {name: value for name, value in tiny_config().to_dict().items() if name != "n_head"} | {"n_heads": 2}
    with pytest.raises(ConfigError, match=r"unknown fields \['n_heads'\], missing fields \['n_head'\]"):
        GPT2Config.from_dict(values)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_layer", 0, "n_layer is 0, expected a whole number above 0"),
        ("n_ctx", -5, "n_ctx is -5"),
        ("n_vocab", 131.0, r"n_vocab is 131\.0"),
        ("n_embd", "32", "n_embd is '32'"),
        ("n_inner", True, "n_inner is True"),
        ("n_inner", None, "n_inner is None"),
        ("n_head", 3, "n_embd 32 is no multiple of n_head 3"),
        ("eos_token_id", 131, "eos_token_id is 131, expected one of the 131 ids"),
        ("eos_token_id", -1, "eos_token_id is -1"),
        ("eos_token_id", None, "eos_token_id is None"),
        ("activation", "swish", "activation is 'swish', expected one of gelu_new, gelu, relu, silu"),
        ("layer_norm_epsilon", 0.0, r"layer_norm_epsilon is 0\.0, expected a number between 0 and 1"),
        ("layer_norm_epsilon", float("nan"), "layer_norm_epsilon is nan"),
        ("layer_norm_epsilon", "1e-5", "layer_norm_epsilon is '1e-5'"),
        ("tie_word_embeddings", 1, "tie_word_embeddings is 1, expected true or false"),
    ],
)
def test_a_number_out_of_range_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPT2Config.from_dict(tiny_config().to_dict() | {field: value})


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        GPT2Config.from_dict(tiny_config().to_dict() | {"n_layer": 0, "n_ctx": 0, "activation": "swish"})
    assert all(name in str(caught.value) for name in ("n_layer", "n_ctx", "activation"))
