"""Perplexity and LAMBADA of the fp32 package against transformers' GPT2LMHeadModel, its tokenizer and torch's softmax.

The texts are the real ones, and lie in the folder that GPT2_EDGE_DATA names.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quantization.evaluate import main
from tests.conftest import DEMO_CHECKPOINT

TOLERANCE = 1e-3
"""Of a perplexity. Measured: 2e-6."""

WINDOW, STRIDE, CHARACTERS = 512, 384, 12_000
PASSAGES = 40
"""The first of LAMBADA's 5,153; with the text, some 5 seconds."""


@dataclass(frozen=True)
class Torch:
    """The demo checkpoint as transformers reads it."""

    torch: Any
    model: Any
    tokenizer: Any

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def logits(self, ids: list[int]) -> Any:
        """[T, V] after each id."""
        with self.torch.inference_mode():
            return self.model(self.torch.tensor([ids])).logits[0]


@pytest.fixture(scope="module")
def data() -> Path:
    folder = os.environ.get("GPT2_EDGE_DATA")
    if not folder:
        pytest.skip("needs WikiText-2 and LAMBADA: set GPT2_EDGE_DATA to the folder with both, see scripts/test")
    return Path(folder)


@pytest.fixture(scope="module")
def oracle(transformers: Any, torch: Any) -> Torch:
    model = transformers.GPT2LMHeadModel.from_pretrained(DEMO_CHECKPOINT, dtype="float32").eval()
    return Torch(torch, model, transformers.GPT2TokenizerFast.from_pretrained(DEMO_CHECKPOINT, model_max_length=10**9))


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert isinstance(row, dict)
    return row


def test_perplexity_of_overlapping_windows_is_torchs(
    demo_fp32: Path, data: Path, oracle: Torch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (data / "wikitext-2-raw" / "wiki.test.raw").read_text(encoding="utf-8")[:CHARACTERS]
    path = tmp_path / "text"
    path.write_text(text, encoding="utf-8")
    row = evaluated(capsys, demo_fp32, "--text", path, "--window", WINDOW, "--stride", STRIDE)
    ids = oracle.ids(text)
    log_p: list[float] = []  # of ids[1], ids[2] ...
    for start in range(0, len(ids), STRIDE):
        window = ids[start : start + WINDOW]
        new = slice(len(log_p) - start, len(window) - 1)  # predictions of tokens that have none yet
        predictions = oracle.logits(window)[new].log_softmax(-1)
        log_p += predictions.gather(1, oracle.torch.tensor(window[1:])[new, None])[:, 0].tolist()
        if start + WINDOW >= len(ids):
            break
    assert row["tokens"] == len(log_p) == len(ids) - 1 > 4 * WINDOW
    assert row["perplexity"] == pytest.approx(math.exp(-sum(log_p) / len(log_p)), rel=TOLERANCE)
    assert row["bits_per_byte"] == pytest.approx(
        -sum(log_p) / math.log(2) / (len(text.encode()) - len(oracle.tokenizer.decode(ids[:1]))), rel=TOLERANCE
    )


def test_lambada_is_torchs(
    demo_fp32: Path, data: Path, oracle: Torch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (data / "lambada" / "lambada_test.jsonl").read_text(encoding="utf-8").split("\n")[:PASSAGES]
    path = tmp_path / "lambada.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    row = evaluated(capsys, demo_fp32, "--lambada", path)
    right, last_right, log_p = 0, 0, 0.0
    for line in lines:
        context, word = json.loads(line)["text"].rsplit(" ", 1)
        target = oracle.ids(" " + word)
        predictions = oracle.logits(oracle.ids(context) + target[:-1])[-len(target) :].log_softmax(-1)
        hits = [greedy == token for greedy, token in zip(predictions.argmax(-1).tolist(), target, strict=True)]
        right += all(hits)
        last_right += hits[-1]
        log_p += sum(float(predictions[place, token]) for place, token in enumerate(target))
    assert row["passages"] == PASSAGES
    assert (row["accuracy"], row["last_token_accuracy"]) == (right / PASSAGES, last_right / PASSAGES)
    assert 0 < row["last_token_accuracy"] < 1
    assert row["perplexity"] == pytest.approx(math.exp(-log_p / PASSAGES), rel=TOLERANCE)
