"""Files that packages are judged on: what is read, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantization.datasets import LastWord, detokenize, read_childrens_book, read_lambada, read_text
from runtime.errors import RequestError

SENTENCES = [f"{number} Sentence {number} ended so ." for number in range(1, 21)]
QUERY = "21 `` Look , '' said the XXXXX , `` I ca n't . ''\tfox\t\tdog|fox|cat"
QUESTION = "\n".join([*SENTENCES, QUERY])


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "file"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_is_read_to_the_byte(tmp_path: Path) -> None:
    text = "one\r\ntwo\u2028three ß\x00 "
    assert read_text(written(tmp_path, text)) == text


def test_bytes_that_are_no_utf8_are_told_by_their_place(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"file: byte 1,002 is no UTF-8 \(invalid start byte\); convert it to UTF-8"):
        read_text(written(tmp_path, "ß".encode() * 501 + b"\xff"))


def test_an_empty_file_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="file: is empty, expected text"):
        read_text(written(tmp_path, ""))
    with pytest.raises(RequestError, match=r"absent: cannot be read \(No such file or directory\)"):
        read_text(tmp_path / "absent")
    with pytest.raises(RequestError, match=r"cannot be read \(Is a directory\)"):
        read_text(tmp_path)


# LAMBADA


def test_a_passage_is_split_at_its_last_space(tmp_path: Path) -> None:
    path = written(tmp_path, '{"text": "He said:\\n\\n\\"Come, old  friend"}\n{"text": "a \u2028b c", "more": 1}\n')
    assert read_lambada(path) == [LastWord(1, 'He said:\n\n"Come, old ', "friend"), LastWord(2, "a \u2028b", "c")]


@pytest.mark.parametrize(
    "line",
    ["", "plain text", "[1]", "{}", '"text"', "null", '{"text": "a b"', "[" * 100_000],
    ids=lambda line: line[:9],
)
def test_a_line_that_is_no_passage_is_told_by_its_number(tmp_path: Path, line: str) -> None:
    path = written(tmp_path, f'{{"text": "a b"}}\n{line}\n{{"text": "a b"}}\n')
    with pytest.raises(RequestError, match=r'file: line 2 is not {"text": "..."}'):
        read_lambada(path)


@pytest.mark.parametrize("text", ['"word"', '" word"', '"ends in a space "', '""', "3", "null"])
def test_a_passage_without_a_last_word_is_told_by_its_number(tmp_path: Path, text: str) -> None:
    with pytest.raises(RequestError, match="file: line 1 has no last word behind a space"):
        read_lambada(written(tmp_path, f'{{"text": {text}}}'))


# The Children's Book Test


@pytest.mark.parametrize("end_of_line", ["\n", "\r\n"])
def test_questions_are_read_in_plain_writing(tmp_path: Path, end_of_line: str) -> None:
    content = f"{QUESTION}\n\n{QUESTION.replace('fox', 'dog', 1)}\n\n\n".replace("\n", end_of_line)
    first, second = read_childrens_book(written(tmp_path, content))
    assert (first.line, second.line) == (1, 23)
    assert (first.answer, second.answer, first.candidates) == ("fox", "dog", ("dog", "fox", "cat"))
    assert first.context == " ".join(f"Sentence {number} ended so." for number in range(1, 21))
    assert first.filled("cat") == first.context + ' "Look," said the cat, "I can\'t."'


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (QUESTION.replace("20 Sent", "19 Sent"), "the question at line 1 is not 21 lines, numbered 1 to 21"),
        ("\n\n" + QUESTION.replace("7 Sentence 7 ended so .\n", ""), "the question at line 3 is not 21 lines"),
        (f"{QUESTION}\n{QUESTION}", "the question at line 1 is not 21 lines"),
        (QUESTION.replace("XXXXX", "fox"), "line 21 is not a sentence with XXXXX, its answer and candidates"),
        (QUESTION.replace("|fox|", "|"), "line 21 is not a sentence with XXXXX"),
        (QUESTION.replace("\t\tdog|fox|cat", ""), "line 21 is not a sentence with XXXXX"),
        (QUESTION.partition("\t")[0], "line 21 is not a sentence with XXXXX"),
        (QUESTION.replace("20 Sent", f"{'9' * 5000} Sent"), "the question at line 1 is not 21 lines"),
        ("\n \n", "file: holds no question"),
        (f"{QUESTION}\n\nmore", "the question at line 23 is not 21 lines"),
    ],
)
def test_a_malformed_question_is_told_by_its_line(tmp_path: Path, content: str, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        read_childrens_book(written(tmp_path, content))


@pytest.mark.parametrize(
    ("tokens", "plain"),
    [
        ("`` It 's mine , '' she said .", '"It\'s mine," she said.'),
        ("`` Thank you , \" said Alice ; `` it 's fine . ''", '"Thank you," said Alice; "it\'s fine."'),
        ("He would n't -- he ca n't ! Would you ?", "He wouldn't -- he can't! Would you?"),
        ("the king -LRB- who 'd gone -RRB- came", "the king (who'd gone) came"),
        ("`` I heard ` no ' , '' they 've said", "\"I heard 'no',\" they've said"),
        ("It was plain already, isn't it?", "It was plain already, isn't it?"),
    ],
)
def test_tokens_of_the_treebank_become_plain_writing(tokens: str, plain: str) -> None:
    assert detokenize(tokens) == plain
