"""One rule of the folder broken on purpose, and a client that fails for it; with the rule kept, the same client runs.

These are what the checks of the other files stand on: a check that a broken folder passes would be none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from runtime.package import MODEL_FILES

from .conftest import our_greedy_ids
from .programs import ClientError, in_node, require
from .test_optimum import optimum_ids

PROMPT = np.array([1, 2, 3], np.int64)
NEW_TOKENS = 4
MODEL = MODEL_FILES["fp32"]

NOBODY = 65534
AS_AN_ORDINARY_USER = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
"""Root without the right to read every file: what is another user's is read only if its mode allows it."""

Copied = Callable[[Path], Path]


@pytest.fixture
def broken(tiny_fp32: Path, copied: Copied) -> Path:
    """A package to break."""
    return copied(tiny_fp32)


def node_ids(package: Path, before: Sequence[str] = ()) -> list[int]:
    require("node")
    (ids,) = in_node(package, ["greedy"], [PROMPT], NEW_TOKENS, before=before)["greedy"]
    written: list[int] = ids
    return written


def change_graph(package: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(package / MODEL, load_external_data=False)
    change(model.graph)
    (package / MODEL).write_bytes(model.SerializeToString())


def test_the_batch_axis_has_the_name_that_transformers_js_knows(broken: Path) -> None:
    def rename(graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.output):
            for axis in value.type.tensor_type.shape.dim:
                if axis.dim_param == "batch_size":
                    axis.dim_param = "rows"

    assert [node_ids(broken)] == our_greedy_ids(broken, [PROMPT], NEW_TOKENS)
    change_graph(broken, rename)
    with pytest.raises(ClientError):
        node_ids(broken)


def test_the_model_stands_in_the_folder_where_transformers_js_looks(broken: Path) -> None:
    assert node_ids(broken)
    for file in (broken / MODEL).parent.iterdir():
        file.rename(broken / file.name)
    with pytest.raises(ClientError, match=r"onnx/model\.onnx"):
        node_ids(broken)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to own files as another user and to give up reading all")
@pytest.mark.parametrize("file", [MODEL, f"{MODEL}_data", "tokenizer.json", "config.json"])
def test_files_are_readable_by_others_than_their_owner(broken: Path, file: str) -> None:
    require("setpriv")
    for path in (broken, *broken.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    assert _reads_everything(broken)
    (broken / file).chmod(0o600)
    assert not _reads_everything(broken)


@pytest.mark.parametrize(
    ("client", "complaint"),
    [
        ("optimum", "num_logits_to_keep is required by model but not provided"),
        ("transformers.js", "num_logits_to_keep Got: 0 Expected: 1"),
    ],
)
def test_num_logits_to_keep_need_not_be_fed(
    broken: Path, optimum: Any, torch: Any, client: str, complaint: str
) -> None:
    """onnxruntime-genai 0.18 feeds it where it is an input; the others do not, or not with our shape."""

    def require_it(graph: onnx.GraphProto) -> None:
        (optional,) = (each for each in graph.initializer if each.name == "num_logits_to_keep")
        graph.initializer.remove(optional)

    def written() -> list[int]:
        if client == "transformers.js":
            return node_ids(broken)
        return optimum_ids(torch, optimum.ORTModelForCausalLM.from_pretrained(broken), [PROMPT], NEW_TOKENS)[0]

    assert [written()] == our_greedy_ids(broken, [PROMPT], NEW_TOKENS)
    change_graph(broken, require_it)
    with pytest.raises((ClientError, ValueError), match=complaint):
        written()


def _reads_everything(package: Path) -> bool:
    """Whether transformers.js, run by a user who does not own the package, opens it and its tokenizer."""
    try:
        in_node(package, ["greedy", "tokenize"], [PROMPT], NEW_TOKENS, texts=["a"], before=AS_AN_ORDINARY_USER)
    except ClientError:
        return False
    return True
