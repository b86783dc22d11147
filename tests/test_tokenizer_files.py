"""Tokenizer files of checkpoints: every layout gives the same bytes, and what is wrong is said."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.tokenizer_files import build_tokenizer, write_tokenizer
from runtime.errors import TokenizerError
from runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parent.parent / "models" / "demo"
DEMO_VOCAB = 8192
VOCABULARY = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "<|endoftext|>": 5}
MERGES = "#version: 0.2\na b\nab c\n"


def write_small(folder: Path, vocabulary: object = VOCABULARY, merges: str = MERGES) -> Path:
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_bytes(merges.encode("utf-8"))
    return folder


def written_bytes(folder: Path, into: Path, n_vocab: int = len(VOCABULARY)) -> bytes:
    write_tokenizer(build_tokenizer(folder, n_vocab=n_vocab), into, n_ctx=1024)
    return (into / "tokenizer.json").read_bytes()


@pytest.fixture
def package_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    return folder


def test_openais_and_hugging_faces_names_give_the_same_bytes(tmp_path: Path, package_dir: Path) -> None:
    shutil.copyfile(DEMO / "vocab.json", tmp_path / "encoder.json")
    shutil.copyfile(DEMO / "merges.txt", tmp_path / "vocab.bpe")
    assert written_bytes(tmp_path, package_dir, DEMO_VOCAB) == written_bytes(DEMO, package_dir, DEMO_VOCAB)


def test_what_was_written_is_read_back_to_the_same_bytes(package_dir: Path) -> None:
    first = written_bytes(DEMO, package_dir, DEMO_VOCAB)
    assert written_bytes(package_dir, package_dir, DEMO_VOCAB) == first


def test_openais_117m_files_build_the_tokenizer_of_117m(package_dir: Path) -> None:
    folder = os.environ.get("GPT2_EDGE_OPENAI_117M")
    if not folder:
        pytest.skip("needs OpenAI's encoder.json and vocab.bpe: set GPT2_EDGE_OPENAI_117M to the folder of 117M")
    written_bytes(Path(folder), package_dir, 50257)
    tokenizer = Tokenizer.load(package_dir / "tokenizer.json")
    assert (tokenizer.n_vocab, tokenizer.special_tokens) == (50257, {"<|endoftext|>": 50256})


def as_older_release(root: dict[str, Any]) -> None:
    """tokenizer.json as it stood on the hub in 2020: merges as text, no model type, `normalized` set."""
    del root["model"]["type"], root["pre_tokenizer"]["use_regex"]
    root["model"]["merges"] = [" ".join(pair) for pair in root["model"]["merges"]]
    root["model"]["continuing_subword_prefix"] = root["model"]["end_of_word_suffix"] = ""
    root["added_tokens"][0]["normalized"] = True


def with_truncation(root: dict[str, Any]) -> None:
    root["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}


def with_empty_template(root: dict[str, Any]) -> None:
    sequence = [{"Sequence": {"id": "A", "type_id": 0}}]
    root["post_processor"] = {"type": "TemplateProcessing", "single": sequence, "pair": sequence, "special_tokens": {}}


@pytest.mark.parametrize("change", [as_older_release, with_truncation, with_empty_template])
def test_settings_that_change_no_id_are_made_ours(
    tmp_path: Path, package_dir: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    ours = written_bytes(write_small(tmp_path), package_dir)
    root = json.loads(ours)
    change(root)
    (package_dir / "tokenizer.json").write_text(json.dumps(root), encoding="utf-8")
    assert written_bytes(package_dir, package_dir) == ours


def test_written_settings(tmp_path: Path, package_dir: Path) -> None:
    root = json.loads(written_bytes(write_small(tmp_path), package_dir))
    assert root["model"]["unk_token"] is None
    assert (root["pre_tokenizer"]["add_prefix_space"], root["pre_tokenizer"]["use_regex"]) == (False, True)
    assert root["post_processor"]["trim_offsets"] is False
    assert [(token["id"], token["content"], token["special"]) for token in root["added_tokens"]] == [
        (5, "<|endoftext|>", True)
    ]
    assert json.loads((package_dir / "tokenizer_config.json").read_text(encoding="utf-8")) == {
        "add_prefix_space": False,
        "bos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": 1024,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|endoftext|>",
    }


@pytest.mark.parametrize(
    "merges",
    ["a b\nab c\n", "a b\nab c", "#version: 0.2\r\na b\r\nab c\r\n", "\ufeff#version: 0.2\na b\nab c\n\n"],
    ids=["no version", "no last line end", "CRLF", "byte order mark"],
)
def test_merges_as_editors_leave_them(tmp_path: Path, package_dir: Path, merges: str) -> None:
    ours = written_bytes(write_small(tmp_path), package_dir)
    assert written_bytes(write_small(tmp_path, merges=merges), package_dir) == ours


def test_byte_order_mark_in_the_vocabulary_is_taken_off(tmp_path: Path) -> None:
    write_small(tmp_path)
    (tmp_path / "vocab.json").write_text("\ufeff" + json.dumps(VOCABULARY), encoding="utf-8")
    assert build_tokenizer(tmp_path, n_vocab=6).get_vocab_size() == 6


def test_merge_of_number_signs_is_no_version_line(tmp_path: Path) -> None:
    write_small(tmp_path, {"#": 0, "##": 1, "<|endoftext|>": 2}, "#version: 0.2\n# #\n")
    assert build_tokenizer(tmp_path, n_vocab=3).encode("##").ids == [1]


def test_padded_embedding_has_more_rows_than_there_are_tokens(tmp_path: Path) -> None:
    assert build_tokenizer(write_small(tmp_path), n_vocab=64).get_vocab_size() == 6


def test_added_tokens_beside_the_vocabulary_are_taken(tmp_path: Path, package_dir: Path) -> None:
    write_small(tmp_path)  # its vocabulary cannot spell the added tokens, nor need it
    (tmp_path / "added_tokens.json").write_text('{"<| user |>": 6, "<|bot|>": 7}', encoding="utf-8")
    first = written_bytes(tmp_path, package_dir, 8)
    assert written_bytes(package_dir, package_dir, 8) == first
    tokenizer = Tokenizer.load(package_dir / "tokenizer.json")
    assert tokenizer.special_tokens == {"<|endoftext|>": 5, "<| user |>": 6, "<|bot|>": 7}
    assert tokenizer.encode("<| user |>abc<|bot|>", special_tokens=True).tolist() == [6, 4, 7]
    assert tokenizer.decode([6, 4]) == "<| user |>abc"


@pytest.mark.parametrize("present", ["none of them", "vocab.json", "merges.txt, encoder.json"])
def test_missing_files_are_listed(tmp_path: Path, present: str) -> None:
    for name in present.split(", "):
        (tmp_path / name).touch()
    with pytest.raises(TokenizerError) as raised:
        build_tokenizer(tmp_path, n_vocab=6)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}: no tokenizer; looked for tokenizer.json, or vocab.json and merges.txt, or ")
    assert f"found {present};" in message


def without(token: str) -> dict[str, int]:
    return {other: token_id for other, token_id in VOCABULARY.items() if other != token}


@pytest.mark.parametrize(
    ("vocabulary", "merges", "fault"),
    [
        (without("c") | {"d": 2}, MERGES, r"vocab\.json and merges\.txt: merges need token 'c', not in the vocabulary"),
        (without("abc") | {"d": 4}, MERGES, "merges need token 'abc', not in the vocabulary"),
        (VOCABULARY, "a b\nw x\ny z\n", "merges need token 'w', 'x', 'wx' and 3 more"),
        (VOCABULARY | {"d": 9}, MERGES, "7 tokens, but none has id 6; expected 0, 1, 2 and so on"),
        (VOCABULARY | {"d": 0}, MERGES, "7 tokens, but none has id 6"),
        (VOCABULARY | {"d": 6, "e": 7}, MERGES, r"8 tokens, but the model has 7 rows \(n_vocab\)"),
        (without("<|endoftext|>"), MERGES, r"no token <\|endoftext\|>"),
        (without("c") | {"d e": 2}, "", "token 2 'd e' is not spelled in GPT-2's byte alphabet"),
        ({"a": "0"}, MERGES, "expected a JSON object of token and whole number"),
        ({"a": True}, MERGES, "expected a JSON object of token and whole number"),
        (["a"], MERGES, "expected a JSON object of token and whole number"),
        (VOCABULARY, "a b\na\n", r"merges\.txt: line 2 is 'a', expected two tokens with a space between"),
        (VOCABULARY, "a b c\n", "line 1 is 'a b c'"),
        (VOCABULARY, " b\n", "line 1 is ' b'"),
    ],
)
def test_faulty_vocabulary_is_refused(tmp_path: Path, vocabulary: object, merges: str, fault: str) -> None:
    with pytest.raises(TokenizerError, match=fault):
        build_tokenizer(write_small(tmp_path, vocabulary, merges), n_vocab=7)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    write_small(tmp_path, {"a": 0, "b": 4}, "a b\n")
    with pytest.raises(TokenizerError, match=r"none has id 1.*model has 1 rows.*no token <\|endof.*merges need token"):
        build_tokenizer(tmp_path, n_vocab=1)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("vocab.json", b"{", "is no JSON"),
        ("vocab.json", b"[" * 100_000, "is no JSON"),
        ("vocab.json", b'{"\xff": 0}', "byte 2 is no UTF-8"),
        ("merges.txt", b"a b\n\xff", "byte 4 is no UTF-8"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    write_small(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"{name}: {fault}"):
        build_tokenizer(tmp_path, n_vocab=6)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BPE = {"type": "BPE", "vocab": VOCABULARY, "merges": [["a", "b"], ["ab", "c"]]}
END = {"id": 5, "content": "<|endoftext|>", "special": True} | dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"model": {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "a"}},
            "model is 'WordLevel', expected 'BPE'",
        ),
        ({"model": BPE | {"ignore_merges": True}}, "ignore_merges is True, expected False"),
        ({"model": BPE | {"byte_fallback": True}}, "byte_fallback is True, expected False"),
        ({"normalizer": {"type": "NFC"}}, "normalizer is 'NFC', expected None"),
        ({"pre_tokenizer": None}, "pre_tokenizer is None, expected 'ByteLevel'"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "add_prefix_space is True, expected False"),
        ({"pre_tokenizer": BYTE_LEVEL | {"use_regex": False}}, "use_regex is False, expected True"),
        ({"decoder": None}, "decoder is None, expected 'ByteLevel'"),
        (
            {
                "post_processor": {
                    "type": "RobertaProcessing",
                    "sep": ["a", 0],
                    "cls": ["b", 1],
                    "trim_offsets": True,
                    "add_prefix_space": False,
                }
            },
            "post_processor is 'RobertaProcessing', expected 'ByteLevel'",
        ),
        ({"added_tokens": [END | {"lstrip": True}]}, r"added token '<\|endoftext\|>' has lstrip"),
        ({"added_tokens": [END, END | {"id": 9, "content": "<pad>"}]}, "7 tokens, but none has id 6"),
        ({"model": 3}, "is no tokenizer: "),
    ],
)
def test_tokenizer_json_of_another_kind_is_refused(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    root = {"version": "1.0", "added_tokens": [END], "pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL, "model": BPE}
    (tmp_path / "tokenizer.json").write_text(json.dumps(root | changes), encoding="utf-8")
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json: .*{fault}"):
        build_tokenizer(tmp_path, n_vocab=7)
