"""The tokenizer: facts of GPT-2's vocabulary, laws of decoding, refusals."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from export.tokenizer_files import build_tokenizer, write_tokenizer
from runtime.errors import TokenizerError
from runtime.tokenizer import Tokenizer, byte_alphabet

DEMO = Path(__file__).parent.parent / "models" / "demo"
DEMO_VOCAB = 8192
END = 8191

token_ids = st.lists(st.integers(0, DEMO_VOCAB - 1), max_size=40)
# The first 256 ids are single bytes: such sequences are full of broken UTF-8.
byte_ids = st.lists(st.integers(0, 255) | st.just(END), max_size=40)


def load_written(folder: Path, into: Path, n_vocab: int) -> Tokenizer:
    write_tokenizer(build_tokenizer(folder, n_vocab=n_vocab), into, n_ctx=512)
    return Tokenizer.load(into / "tokenizer.json")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_written(DEMO, tmp_path_factory.mktemp("demo"), DEMO_VOCAB)


@pytest.fixture(scope="module")
def openai(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = os.environ.get("GPT2_EDGE_OPENAI_117M")
    if not folder:
        pytest.skip("needs OpenAI's encoder.json and vocab.bpe: set GPT2_EDGE_OPENAI_117M to the folder of 117M")
    return load_written(Path(folder), tmp_path_factory.mktemp("openai"), 50257)


def test_hello_world_in_openais_vocabulary(openai: Tokenizer) -> None:
    assert openai.encode("hello world").tolist() == [31373, 995]


def test_end_of_text_in_user_text_is_seven_ordinary_tokens(openai: Tokenizer) -> None:
    assert openai.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]


def test_end_of_text_is_one_token_where_it_is_asked_for(openai: Tokenizer) -> None:
    ids = openai.encode("<|endoftext|>hello world<|endoftext|><|endoftext|>", special_tokens=True)
    assert ids.tolist() == [50256, 31373, 995, 50256, 50256]


def test_longest_token_of_openais_vocabulary_has_128_bytes(openai: Tokenizer) -> None:
    assert max(len(openai.token_bytes(token_id)) for token_id in range(openai.n_vocab)) == 128


def test_byte_alphabet_spells_every_byte_once() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert (alphabet["A"], alphabet["Ġ"], alphabet["Ċ"], alphabet["Ń"]) == (0x41, 0x20, 0x0A, 0xAD)


def test_demo_vocabulary(demo: Tokenizer) -> None:
    assert demo.n_vocab == DEMO_VOCAB
    assert demo.special_tokens == {"<|endoftext|>": END}
    assert demo.token_bytes(END) == b"<|endoftext|>"


def test_ids_are_int64_even_when_there_are_none(demo: Tokenizer) -> None:
    for text in ("", "a man"):
        assert demo.encode(text).dtype == np.int64
    assert demo.encode("").shape == (0,)


@given(text=st.text())
def test_decoding_what_was_encoded_gives_the_text(demo: Tokenizer, text: str) -> None:
    assert demo.decode(demo.encode(text)) == text


@pytest.fixture(scope="module")
def library(demo: Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer as `tokenizers` runs it by default: special tokens are looked for in the text."""
    return tokenizers.Tokenizer.from_str(demo._backend.to_str())


@given(pieces=st.lists(st.sampled_from(["<|endoftext|>", " ", "\n", "the sea", "<|", "é", "😀"]), max_size=12))
def test_special_tokens_split_as_the_tokenizers_library_does(
    demo: Tokenizer, library: tokenizers.Tokenizer, pieces: list[str]
) -> None:
    text = "".join(pieces)
    assert demo.encode(text, special_tokens=True).tolist() == library.encode(text).ids
    assert demo.decode(demo.encode(text, special_tokens=True)) == text


@given(ids=token_ids | byte_ids)
def test_stream_equals_decode(demo: Tokenizer, ids: list[int]) -> None:
    stream = demo.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == demo.decode(ids)


@given(ids=token_ids | byte_ids)
def test_decode_equals_that_of_the_tokenizers_library(
    demo: Tokenizer, library: tokenizers.Tokenizer, ids: list[int]
) -> None:
    assert demo.decode(ids) == library.decode(ids, skip_special_tokens=False)


@given(text=st.text(min_size=1))
def test_stream_of_good_text_never_shows_half_a_character(demo: Tokenizer, text: str) -> None:
    stream = demo.stream()
    shown = ""
    for token_id in demo.encode(text):
        shown += stream.push(token_id)
        assert text.startswith(shown)
    assert stream.finish() == ""
    assert shown == text


def test_stream_holds_a_character_back_until_it_is_whole(demo: Tokenizer) -> None:
    ids = {demo.token_bytes(token_id): token_id for token_id in range(256)}
    stream = demo.stream()
    assert [stream.push(ids[bytes([byte])]) for byte in "😀".encode()] == ["", "", "", "😀"]


def test_unfinished_character_comes_out_at_the_end_and_only_once(demo: Tokenizer) -> None:
    ids = {demo.token_bytes(token_id): token_id for token_id in range(256)}
    stream = demo.stream()
    assert [stream.push(ids[b"\xf0"]), stream.finish(), stream.push(ids[b"a"]), stream.finish()] == ["", "�", "a", ""]


def test_decode_takes_the_array_that_encode_gives(demo: Tokenizer) -> None:
    assert demo.decode(np.array([END, END])) == "<|endoftext|><|endoftext|>"


@pytest.mark.parametrize("token_id", [-1, DEMO_VOCAB])
def test_id_outside_the_vocabulary_is_refused(demo: Tokenizer, token_id: int) -> None:
    message = f"token id {token_id} is not in the vocabulary, expected 0 to 8191"
    with pytest.raises(TokenizerError, match=message):
        demo.decode([0, token_id])
    with pytest.raises(TokenizerError, match=message):
        demo.stream().push(token_id)


@pytest.mark.parametrize("special_tokens", [False, True])
def test_half_a_surrogate_pair_is_refused(demo: Tokenizer, special_tokens: bool) -> None:
    with pytest.raises(TokenizerError, match=r"text: holds U\+DCFF, half of a surrogate pair"):
        demo.encode("ab\udcff", special_tokens=special_tokens)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"absent\.json: cannot be read: No such file"):
        Tokenizer.load(tmp_path / "absent.json")


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"version":"1.0","model":{"type":"BPE"'])
def test_damaged_file_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(damage)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: is no tokenizer: .*copy the package again"):
        Tokenizer.load(path)


def small_tokenizer(vocabulary: dict[str, int], **changes: Any) -> str:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    parts = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    return json.dumps(parts | changes)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (small_tokenizer({"a": 0}, decoder=None), "expected a byte-level BPE"),
        (
            small_tokenizer({"a": 0}, model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
            "is a WordLevel tokenizer",
        ),
        (small_tokenizer({"a": 0, "b c": 1}), "token 1 'b c' is not spelled in GPT-2's byte alphabet"),
        (small_tokenizer({"a": 0, "b": 2}), "2 tokens, but none has id 1"),
        (small_tokenizer({"a": 0, "b": 0}), "2 tokens, but none has id 1"),
    ],
)
def test_tokenizer_of_another_kind_is_refused(tmp_path: Path, content: str, fault: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json: .*{fault}"):
        Tokenizer.load(path)


def test_text_that_the_vocabulary_cannot_spell_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(small_tokenizer({"a": 0, "b": 1}), encoding="utf-8")
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encode("abba").tolist() == [0, 1, 1, 0]
    with pytest.raises(TokenizerError, match="no token for the bytes 0x63, 0xA9, 0xC3"):
        tokenizer.encode("abcé")


def test_truncation_in_the_file_is_not_obeyed(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path = tmp_path / "tokenizer.json"
    path.write_text(small_tokenizer({"a": 0}, truncation=truncation), encoding="utf-8")
    assert Tokenizer.load(path).encode("aaaa").tolist() == [0, 0, 0, 0]


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match="pip install tokenizers"):
        Tokenizer.load(tmp_path / "tokenizer.json")
