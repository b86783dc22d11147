"""examples/json_schema: what comes out follows the schema, however soon it must end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from runtime import RequestError, SamplingOptions, TextGenerator, TextSession

if os.environ.get("GPT2_EDGE_REQUIRE_CLIENTS") != "1":
    pytest.importorskip("llguidance")

from examples.json_schema.json_schema import SLACK, JsonSchema, generate_json, main

FRIEND = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 3}, "kind": {"enum": ["king", "horse"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "friends": {"type": "array", "items": FRIEND},
        "note": {"type": "string"},
    },
    "required": ["name", "age", "friends"],
    "additionalProperties": False,
}
SHORTEST = 23
"""Tokens of the demo model that the shortest document takes."""


@pytest.fixture(scope="module")
def demo(demo_int8: Path) -> TextGenerator:
    return TextGenerator.load(demo_int8)


@pytest.fixture(scope="module")
def schema(demo: TextGenerator) -> JsonSchema:
    return JsonSchema(demo, SCHEMA)


def follows(value: Any) -> bool:
    """What SCHEMA says, in Python."""
    return (
        {"name", "age", "friends"} <= set(value) <= {"name", "age", "friends", "note"}
        and isinstance(value["name"], str)
        and type(value["age"]) is int
        and all(
            set(friend) == {"name", "kind"} and len(friend["name"]) >= 3 and friend["kind"] in ("king", "horse")
            for friend in value["friends"]
        )
    )


@pytest.mark.parametrize("max_new_tokens", [SHORTEST, SHORTEST + 1, SHORTEST + SLACK + 1, 60, 128])
def test_a_document_is_whole_and_follows_its_schema_however_many_tokens_it_gets(
    demo: TextGenerator, schema: JsonSchema, max_new_tokens: int
) -> None:
    values = [
        generate_json(
            demo, schema, "The old king", max_new_tokens=max_new_tokens, sampling=SamplingOptions(seed=seed, top_k=0)
        )
        for seed in range(8)
    ]
    assert all(map(follows, values))
    if max_new_tokens == 128:
        assert len({json.dumps(value) for value in values}) == 8


def test_without_the_schema_the_model_writes_no_json(demo: TextGenerator) -> None:
    """Else the test above would prove nothing."""
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(demo.generate("The old king", max_new_tokens=60, sampling=SamplingOptions(seed=0)).text)


def test_a_document_ends_by_itself_where_nothing_more_may_come(demo: TextGenerator) -> None:
    choice = JsonSchema(demo, {"enum": ["king", "horse"]})
    document = choice.document(max_new_tokens=50)
    sample = demo.generate("The", max_new_tokens=50, logits_processor=document).samples[0]
    assert sample.finish_reason == "stop"
    assert sample.text in ('"king"', '"horse"')


def test_a_session_may_go_on_with_a_document(demo: TextGenerator, schema: JsonSchema) -> None:
    session = TextSession(demo, sampling=SamplingOptions(seed=1))
    session.append("The old king")
    session.generate(max_new_tokens=5)
    session.append("\nAs JSON: ")
    sample = session.generate(max_new_tokens=80, logits_processor=schema.document(max_new_tokens=80))
    assert follows(json.loads(sample.text))


def test_too_few_tokens_for_any_document_are_refused(demo: TextGenerator, schema: JsonSchema) -> None:
    with pytest.raises(RequestError, match=f"takes {SHORTEST} tokens, max_new_tokens is {SHORTEST - 1}; ask for more"):
        generate_json(demo, schema, "The old king", max_new_tokens=SHORTEST - 1)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "nonsense"}, "no such JSON schema: .*nonsense"),
        ({"type": "string", "minLength": 2000}, "asks for an ending of more than 256 tokens"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(demo: TextGenerator, schema: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        JsonSchema(demo, schema).document(max_new_tokens=100)


def test_it_runs_from_the_command_line(demo_int8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8")
    assert main([str(demo_int8), str(path), "The old king", "--seed", "1"]) == 0
    assert follows(json.loads(capsys.readouterr().out))
    path.write_text("{", encoding="utf-8")
    assert main([str(demo_int8), str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path} is no JSON (")
