"""What a GPT-2 is: its numbers, and the four official sizes. The one place where model numbers stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from .errors import ConfigError

Activation = Literal["gelu_new", "gelu", "relu", "silu"]
"""gelu_new is the tanh form that OpenAI trained with, gelu the exact erf form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Config:
    """The numbers that determine GPT-2's function, named as in OpenAI's hparams.

    Raises:
        ConfigError: a number is out of range, or two contradict each other; all are named.
    """

    n_layer: int
    n_head: int
    n_embd: int
    n_ctx: int
    n_vocab: int
    n_inner: int
    eos_token_id: int
    activation: Activation = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)!r}, expected a whole number above 0"
            for name in ("n_layer", "n_head", "n_embd", "n_ctx", "n_vocab", "n_inner")
            if type(getattr(self, name)) is not int or getattr(self, name) < 1
        ]
        if not faults and self.n_embd % self.n_head:
            faults.append(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        if type(self.eos_token_id) is not int or (not faults and not 0 <= self.eos_token_id < self.n_vocab):
            faults.append(f"eos_token_id is {self.eos_token_id!r}, expected one of the {self.n_vocab} ids")
        if self.activation not in get_args(Activation):
            faults.append(f"activation is {self.activation!r}, expected one of {', '.join(get_args(Activation))}")
        if not isinstance(self.layer_norm_epsilon, float) or not 0 < self.layer_norm_epsilon < 1:
            faults.append(f"layer_norm_epsilon is {self.layer_norm_epsilon!r}, expected a number between 0 and 1")
        for name in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"):
            if type(getattr(self, name)) is not bool:
                faults.append(f"{name} is {getattr(self, name)!r}, expected true or false")
        if faults:
            raise ConfigError("GPT-2 configuration: " + "; ".join(faults))

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def cache_items_per_token(self) -> int:
        """Numbers in the keys and values of one token, all layers."""
        return 2 * self.n_layer * self.n_embd

    @property
    def parameter_count(self) -> int:
        """Parameters, a tied head counted once: 124,439,808 for 124M."""
        block = self.n_embd * (4 * self.n_embd + 4 + 4 + 2 * self.n_inner + 1) + self.n_inner
        heads = 1 if self.tie_word_embeddings else 2
        return self.n_layer * block + (heads * self.n_vocab + self.n_ctx + 2) * self.n_embd

    def attention_scale(self, layer: int) -> float:
        """The factor on q . k before the softmax of `layer` (0-based)."""
        scale: float = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPT2Config:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: a field is missing, unknown, or out of range.
        """
        known = {field.name for field in fields(cls)}
        unknown, missing = sorted(set(values) - known), sorted(known - set(values))
        if unknown or missing:
            raise ConfigError(f"GPT-2 configuration: unknown fields {unknown}, missing fields {missing}")
        return cls(**values)


def official_config(n_layer: int, n_head: int, n_embd: int) -> GPT2Config:
    """The configuration of one of OpenAI's releases, which differ in three numbers only."""
    return GPT2Config(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_ctx=1024,
        n_vocab=50257,
        n_inner=4 * n_embd,
        eos_token_id=50256,
    )


OFFICIAL_SIZES: Mapping[str, GPT2Config] = {
    "124M": official_config(12, 12, 768),
    "355M": official_config(24, 16, 1024),
    "774M": official_config(36, 20, 1280),
    "1558M": official_config(48, 25, 1600),
}
