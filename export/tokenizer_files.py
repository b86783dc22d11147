"""Every tokenizer layout of a GPT-2 checkpoint -> one tokenizer.json and tokenizer_config.json.

Only the tokens, the merges and the added tokens are taken from the checkpoint. The tokenizer is built anew from these
three, so the same vocabulary gives the same bytes whichever files it came in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from runtime.errors import TokenizerError
from runtime.package import TOKENIZER, TOKENIZER_CONFIG
from runtime.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
EXAMPLES_SHOWN = 3
"""Of one kind of fault: enough to find it, few enough for one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What makes one GPT-2 tokenizer differ from another.

    Attributes:
        source: the files it was read from, for messages.
        ids: token -> id, every added token included.
        merges: pairs of tokens, the first to be merged first.
        added: added token -> whether it is special.
    """

    source: str
    ids: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    added: Mapping[str, bool]


def build_tokenizer(folder: Path, *, n_vocab: int) -> tokenizers.Tokenizer:
    """Build the tokenizer of a checkpoint folder.

    Args:
        folder: holds tokenizer.json, or vocab.json and merges.txt, or encoder.json and vocab.bpe; the first that is
            there is taken.
        n_vocab: rows of the model's embedding; the tokenizer may have fewer tokens (padded rows), never more.
    Raises:
        TokenizerError: no such files, or they are damaged, no byte-level BPE as GPT-2's, or of another model; all that
            is wrong with a vocabulary is named.
    """
    vocabulary = read_vocabulary(folder)
    faults = [*_id_faults(vocabulary, n_vocab), *_merge_faults(vocabulary)]
    if faults:
        raise TokenizerError(f"{vocabulary.source}: " + "; ".join(faults))
    tokenizer = tokenizers.Tokenizer(models.BPE(dict(vocabulary.ids), list(vocabulary.merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for token in sorted(vocabulary.added, key=vocabulary.ids.__getitem__):
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=vocabulary.added[token])])
    try:
        Tokenizer(tokenizer)  # what the runtime would refuse is refused before a package is made of it
    except TokenizerError as error:
        raise TokenizerError(f"{vocabulary.source}: {error}") from error
    return tokenizer


def write_tokenizer(tokenizer: tokenizers.Tokenizer, package_dir: Path, n_ctx: int) -> None:
    """Write tokenizer.json, and the tokenizer_config.json by which transformers and its kin find the right class."""
    tokenizer_config = {
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": n_ctx,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": END_OF_TEXT,
    }
    (package_dir / TOKENIZER).write_bytes(tokenizer.to_str().encode("utf-8"))
    (package_dir / TOKENIZER_CONFIG).write_bytes((json.dumps(tokenizer_config, indent=2) + "\n").encode("utf-8"))


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read whichever tokenizer files the folder holds; their contents are checked in shape only.

    Raises:
        TokenizerError: no complete set of files, or one is damaged.
    """
    layouts: dict[tuple[str, ...], Callable[..., Vocabulary]] = {
        ("tokenizer.json",): _read_tokenizer_json,  # first: it alone holds the added tokens of a fine-tune
        ("vocab.json", "merges.txt"): _read_vocab_and_merges,
        ("encoder.json", "vocab.bpe"): _read_vocab_and_merges,
    }
    for names, read in layouts.items():
        if all((folder / name).is_file() for name in names):
            return read(*(folder / name for name in names))
    present = [name for names in layouts for name in names if (folder / name).is_file()]
    raise TokenizerError(
        f"{folder}: no tokenizer; looked for {', or '.join(' and '.join(names) for names in layouts)}; "
        f"found {', '.join(present) or 'none of them'}; name a folder that has them with --tokenizer DIR"
    )


def _read_vocab_and_merges(vocab_path: Path, merges_path: Path) -> Vocabulary:
    """Read token -> id and the merges, and Hugging Face's added_tokens.json (token -> id) where there is one."""
    ids = _read_ids(vocab_path)
    added_path = vocab_path.with_name("added_tokens.json")
    added = _read_ids(added_path) if added_path.is_file() else {}
    return Vocabulary(
        source=f"{vocab_path} and {merges_path.name}",
        ids=ids | added,
        merges=_read_merges(merges_path),
        added=dict.fromkeys([*added, END_OF_TEXT], True),
    )


def _read_tokenizer_json(path: Path) -> Vocabulary:
    text = _read_text(path)
    try:
        # There and back through the library: any version's layout in, the present one out, every field in its place.
        canonical = json.loads(tokenizers.Tokenizer.from_buffer(text.encode("utf-8")).to_str())
    except ValueError as error:
        raise TokenizerError(f"{path}: is no tokenizer: {error}; copy the checkpoint again") from error
    if faults := _differences_from_gpt2(canonical):
        raise TokenizerError(f"{path}: is no tokenizer of GPT-2's kind: " + "; ".join(faults))
    # As the file has it: where ids have gaps, the library hands out others.
    added = json.loads(text).get("added_tokens") or []
    return Vocabulary(
        source=str(path),
        ids=canonical["model"]["vocab"] | {token["content"]: token["id"] for token in added},
        merges=[(left, right) for left, right in canonical["model"]["merges"]],
        added={token["content"]: token["special"] for token in added} | {END_OF_TEXT: True},
    )


def _differences_from_gpt2(root: Mapping[str, Any]) -> list[str]:
    """List the settings of a tokenizer.json by which it would give other ids than GPT-2's encoder."""
    model, splitter, after = root["model"], root["pre_tokenizer"] or {}, root["post_processor"] or {}
    adds_tokens = after.get("type", "ByteLevel") != "ByteLevel" and after.get("special_tokens") != {}
    settings = [
        ("model", model["type"], "BPE"),
        ("continuing_subword_prefix", model.get("continuing_subword_prefix") or None, None),
        ("end_of_word_suffix", model.get("end_of_word_suffix") or None, None),
        ("byte_fallback", model.get("byte_fallback", False), False),
        ("ignore_merges", model.get("ignore_merges", False), False),
        ("normalizer", (root["normalizer"] or {}).get("type"), None),
        ("pre_tokenizer", splitter.get("type"), "ByteLevel"),
        ("add_prefix_space", splitter.get("add_prefix_space", False), False),
        ("use_regex", splitter.get("use_regex", True), True),
        ("post_processor", after["type"] if adds_tokens else "ByteLevel", "ByteLevel"),
        ("decoder", (root["decoder"] or {}).get("type"), "ByteLevel"),
    ]
    return [f"{name} is {got!r}, expected {expected!r}" for name, got, expected in settings if got != expected] + [
        f"added token {token['content']!r} has {flag}, which the runtime does not do"
        for token in root["added_tokens"]
        for flag in ("single_word", "lstrip", "rstrip")
        if token[flag]
    ]


def _id_faults(vocabulary: Vocabulary, n_vocab: int) -> list[str]:
    faults, ids = [], vocabulary.ids
    if gaps := set(range(len(ids))).difference(ids.values()):
        faults.append(f"{len(ids)} tokens, but none has {_examples(sorted(gaps), 'id')}; expected 0, 1, 2 and so on")
    if len(ids) > n_vocab:
        faults.append(
            f"{len(ids)} tokens, but the model has {n_vocab} rows (n_vocab): this is the tokenizer of another model"
        )
    if END_OF_TEXT not in ids:
        faults.append(f"no token {END_OF_TEXT}, which every GPT-2 vocabulary has")
    return faults


def _merge_faults(vocabulary: Vocabulary) -> list[str]:
    unknown = {
        token: None  # a set that keeps the order
        for left, right in vocabulary.merges
        for token in (left, right, left + right)
        if token not in vocabulary.ids
    }
    return [f"merges need {_examples(list(unknown), 'token')}, not in the vocabulary"] if unknown else []


def _examples(faulty: Sequence[object], noun: str) -> str:
    shown = ", ".join(map(repr, faulty[:EXAMPLES_SHOWN]))
    more = f" and {len(faulty) - EXAMPLES_SHOWN} more" if len(faulty) > EXAMPLES_SHOWN else ""
    return f"{noun} {shown}{more}"


def _read_ids(path: Path) -> dict[str, int]:
    try:
        ids = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: is no JSON: {error}; copy the checkpoint again") from error
    if not isinstance(ids, dict) or any(type(token_id) is not int for token_id in ids.values()):
        raise TokenizerError(f"{path}: expected a JSON object of token and whole number")
    return ids


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Read one merge per line, "left right"; a version line at the top and empty lines are passed over."""
    merges = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        match line.split(" "):
            case [left, right] if left and right:
                merges.append((left, right))
            case _:
                raise TokenizerError(f"{path}: line {number} is {line!r}, expected two tokens with a space between")
    return merges


def _read_text(path: Path) -> str:
    """Read UTF-8; a byte order mark and Windows line ends, which editors and git add, are taken off."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: byte {error.start} is no UTF-8; copy the checkpoint again") from error
