"""What a Hugging Face generation_config.json may ask for that this runtime does not do: refused by name.

Names and neutral values as in transformers 4.57.6. What is read elsewhere (sampling, stopping, beam search), and what
leaves the text alone (caches, padding, outputs, assistants that only make it faster), passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import RequestError

NEUTRAL: Mapping[str, object] = {
    "begin_suppress_tokens": None,
    "constraints": None,
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "max_time": None,
    "num_beam_groups": 1,
    "num_return_sequences": 1,  # as a default: a stream is one text
    "penalty_alpha": 0.0,
    "suppress_tokens": None,
    "token_healing": False,
    "watermarking_config": None,
}
"""Options that would change the text, each with the value that switches it off; null does so for all of them."""


def refuse_unhonoured(values: Mapping[str, Any]) -> None:
    """Refuse a generation_config that asks for what would be ignored here.

    Raises:
        RequestError: names all such options.
    """
    asked = [
        f"{name} {values[name]!r}"
        for name, neutral in NEUTRAL.items()
        if values.get(name) not in (None, neutral) and values[name] != []
    ]
    if asked:
        raise RequestError(
            f"generation_config asks for {', '.join(asked)}, which this runtime does not take from there and will not "
            "ignore; remove them from generation_config.json, or set them to null"
        )
