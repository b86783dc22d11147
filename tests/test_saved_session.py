"""The session file: what was saved comes back, and anything else is one line that says why not."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import MachineError, RequestError, SamplingOptions, SessionError, TextGenerator, TextSession
from runtime.package import Manifest, open_package
from runtime.saved_session import FILE_LIMIT_BYTES, SavedSession, read_session, write_session

from .conftest import bytes_checkpoint, converted

SEED = SamplingOptions(seed=7, temperature=0.75)
ROOT = Path(__file__).parents[1]

Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def babbler(tiny_fp32: Path) -> TextGenerator:
    return TextGenerator.load(tiny_fp32)


@pytest.fixture(scope="module")
def manifest(babbler: TextGenerator) -> Manifest:
    return babbler.package.manifest


@pytest.fixture
def path(babbler: TextGenerator, tmp_path: Path) -> Path:
    """A session with tokens of every kind: given and run, generated, given and not yet run."""
    session = TextSession(babbler, sampling=SEED, sample=3)
    session.append("once")
    session.generate(max_new_tokens=4, min_new_tokens=4)
    session.append("and")
    session.save(tmp_path / "session.npz")
    return tmp_path / "session.npz"


def same(one: SavedSession, other: SavedSession) -> bool:
    return (one.sampling, one.sample) == (other.sampling, other.sample) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("ids", "generated", "past")
    )


def altered(path: Path, alter: Callable[[Arrays], object]) -> Path:
    """The file with other arrays, written by numpy: whole, but not what we wrote."""
    with np.load(path) as file:
        arrays = dict(file)
    alter(arrays)
    np.savez(path, **arrays)
    return path


def altered_state(path: Path, **values: object) -> Path:
    def alter(arrays: Arrays) -> None:
        state = json.loads(arrays["state"].tobytes())
        for name, value in values.items():
            (state["sampling"] if name in state["sampling"] else state)[name] = value
        arrays["state"] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return altered(path, alter)


def refusal(path: Path, manifest: Manifest) -> str:
    with pytest.raises(SessionError) as caught:
        read_session(path, manifest)
    message = str(caught.value)
    assert caught.value.exit_status == 2
    assert message.isprintable()
    assert str(path) in message
    return message


# What comes back


def test_what_was_saved_comes_back(path: Path, manifest: Manifest) -> None:
    saved = read_session(path, manifest)
    assert saved.ids.tolist()[:4] == list(b"once")
    assert saved.generated.tolist() == [False] * 4 + [True] * 4 + [False] * 3
    assert (saved.sampling, saved.sample) == (SEED, 3)
    assert saved.past.shape == (4, 2, 7, 16)  # the last generated token was not run, nor what follows it


def test_only_what_is_filled_is_written(path: Path, manifest: Manifest) -> None:
    assert 7 * manifest.cache_bytes_per_token < path.stat().st_size < 7 * manifest.cache_bytes_per_token + 3000


def test_a_session_without_tokens_comes_back(babbler: TextGenerator, tmp_path: Path) -> None:
    TextSession(babbler, sampling=SEED).save(tmp_path / "empty")
    session = TextSession.restore(babbler, tmp_path / "empty")
    assert (session.ids, session.sampling) == ((), SEED)


def test_a_full_context_comes_back(babbler: TextGenerator, tmp_path: Path) -> None:
    session = TextSession(babbler, sampling=SEED)
    session.append("x" * 60)
    session.generate(min_new_tokens=4)
    session.save(tmp_path / "full")
    restored = TextSession.restore(babbler, tmp_path / "full")
    assert (restored.ids, restored.tokens_left) == (session.ids, 0)


def test_numpy_reads_the_file_without_pickle(path: Path) -> None:
    with np.load(path, allow_pickle=False) as file:
        assert {name: (file[name].dtype.str, file[name].ndim) for name in file.files} == {
            "state": ("|u1", 1),
            "ids": ("<i8", 1),
            "generated": ("|u1", 1),
            "past": ("<f4", 4),
        }


def test_an_int8_cache_is_saved_as_it_is(demo_int8_kv8: Path, tmp_path: Path) -> None:
    generator = TextGenerator.load(demo_int8_kv8)
    session = TextSession(generator)
    session.append([5, 6, 7])
    session.generate(max_new_tokens=1)
    session.save(tmp_path / "session")
    assert read_session(tmp_path / "session", generator.package.manifest).past.dtype == np.int8


# Writing


def test_a_session_that_cannot_be_written_leaves_the_old_one(
    babbler: TextGenerator, path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, expected = path.read_bytes(), read_session(path, manifest)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match=r"session\.npz: the session cannot be saved \(No space left on device\)"):
        TextSession(babbler).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert same(read_session(path, manifest), expected)


@pytest.mark.parametrize("place", ["missing/session.npz", ""])
def test_a_place_that_no_file_can_have_is_refused(babbler: TextGenerator, tmp_path: Path, place: str) -> None:
    with pytest.raises(MachineError, match="the session cannot be saved"):
        TextSession(babbler).save(tmp_path / place)
    assert not list(tmp_path.iterdir())


def test_a_session_beyond_the_files_limit_is_refused(path: Path, manifest: Manifest) -> None:
    saved = read_session(path, manifest)
    huge = replace(saved, past=np.broadcast_to(np.float32(0), (FILE_LIMIT_BYTES // 4 + 1,)))
    before = path.read_bytes()
    with pytest.raises(RequestError, match=r"take 2,146,435,076 bytes, a session file holds up to 2,146,435,072"):
        write_session(path, huge, manifest)
    assert path.read_bytes() == before


# Damage


def test_any_byte_that_changed_is_refused_or_means_nothing(path: Path, manifest: Manifest) -> None:
    """A zip has bytes that nobody reads, dates for one: then all that counts is unchanged."""
    whole, expected = path.read_bytes(), read_session(path, manifest)
    rng, refused = np.random.default_rng(0), 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            assert same(read_session(path, manifest), expected), f"byte {place} of {len(whole)}"
        except SessionError as error:
            assert str(error).isprintable(), f"byte {place} of {len(whole)}"
            refused += 1
    assert refused > 0.95 * len(whole)


def test_a_file_that_was_cut_anywhere_is_refused(path: Path, manifest: Manifest) -> None:
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refusal(path, manifest)


def test_a_file_that_was_added_to_is_refused(path: Path, manifest: Manifest) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    assert "its end is not an npz file's" in refusal(path, manifest)


@pytest.mark.parametrize("content", [b"", b"text\n", b"PK\5\6" + bytes(18), b"PK\5\6" * 100, bytes(1000)])
def test_something_else_is_refused(path: Path, manifest: Manifest, content: bytes) -> None:
    path.write_bytes(content)
    assert "is no whole session file" in refusal(path, manifest)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path, manifest: Manifest) -> None:
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "none", manifest)
    assert "cannot be read (Is a directory)" in refusal(tmp_path, manifest)


# Whole files that are no sessions, or hostile


def huge_ids(arrays: Arrays) -> None:
    arrays["ids"] = np.zeros(65, np.int64)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda a: a.pop("past"), "it holds 3 arrays"),
        (lambda a: a.update(more=a["ids"]), "it holds 5 arrays"),
        (lambda a: a.update(more=a.pop("ids")), "it holds ['state', 'generated', 'past', 'more'], expected state"),
        (lambda a: a.update(ids=a["ids"].astype(object)), "ids.npy holds no plain numbers in rows"),
        (lambda a: a.update(state=np.array({"a": 1})), "state.npy holds no plain numbers in rows"),
        (lambda a: a.update(past=np.asfortranarray(a["past"])), "past.npy holds no plain numbers in rows"),
        (lambda a: a.update(ids=a["ids"].astype(np.int32)), "ids.npy is <i4 [11], expected <i8 [0 to 64]"),
        (lambda a: a.update(ids=a["ids"].astype(">i8")), "ids.npy holds no plain numbers in rows"),
        (lambda a: a.update(ids=a["ids"][None]), "ids.npy is <i8 [1, 11]"),
        (huge_ids, "ids.npy is <i8 [65], expected <i8 [0 to 64] for this package"),
        (lambda a: a.update(ids=a["ids"] + 250), "is not in the model, expected 0 to 256"),
        (lambda a: a.update(ids=a["ids"] - 250), "is not in the model, expected 0 to 256"),
        (lambda a: a.update(generated=a["generated"][1:]), "generated marks 10 tokens by 0 and 1, expected 11"),
        (lambda a: a.update(generated=a["generated"] * 2), "generated marks 11 tokens by 0 and 1"),
        (lambda a: a.update(past=a["past"].astype(np.int8)), "past.npy is |i1 [4, 2, 7, 16], expected <f4 [4, 2, 0 to"),
        (lambda a: a.update(past=a["past"][:2]), "past.npy is <f4 [2, 2, 7, 16], expected <f4 [4, 2, 0 to 10, 16]"),
        (lambda a: a.update(past=np.repeat(a["past"], 2, axis=2)), "past.npy is <f4 [4, 2, 14, 16]"),
        (lambda a: a.update(past=a["past"] * np.nan), "past holds numbers that are not finite"),
        (lambda a: a.update(state=a["state"][1:]), "is no whole session file"),
        (lambda a: a.update(state=np.zeros(1048577, np.uint8)), "state.npy is |u1 [1048577], expected |u1 [0 to"),
        (lambda a: a.update(state=np.frombuffer(b"[" * 60000, np.uint8)), "is no whole session file"),
        (lambda a: a.update(state=np.frombuffer(b"[1]", np.uint8)), "session format version None"),
    ],
)
def test_arrays_that_are_no_session_are_refused(
    path: Path, manifest: Manifest, alter: Callable[[Arrays], object], message: str
) -> None:
    assert message in refusal(altered(path, alter), manifest)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": 2}, "session format version 2, this runtime reads 1; update gpt2-edge"),
        ({"format_version": "\x1b[2J"}, "session format version '\\x1b[2J'"),
        ({"sample": -1}, "lacks package, sampling or sample"),
        ({"sample": 1 << 64}, "lacks package, sampling or sample"),
        ({"sample": "0"}, "lacks package, sampling or sample"),
        ({"sampling": None}, "lacks package, sampling or sample"),
        ({"sampling": {"beams": 4}}, "beams"),
        ({"seed": None}, "its seed is null"),
        ({"seed": -1}, "seed is -1, expected a whole number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "1"}, "temperature is '1'"),
    ],
)
def test_a_state_that_makes_no_sense_is_refused(
    path: Path, manifest: Manifest, values: dict[str, Any], message: str
) -> None:
    assert message in refusal(altered_state(path, **values), manifest)


def test_compressed_arrays_are_refused_before_they_are_unpacked(path: Path, manifest: Manifest) -> None:
    with np.load(path) as file:
        np.savez_compressed(path, **file)
    assert "state.npy is compressed, expected stored" in refusal(path, manifest)


def test_no_memory_is_asked_for_that_a_file_claims(path: Path, manifest: Manifest) -> None:
    """A header of an exabyte, and one of what the package might hold but the file does not."""
    for shape, message in (
        ((4, 2, 10**15, 16), "expected"),
        ((4, 2, 10, 16), "past.npy has 3712 bytes, expected 5248"),
    ):
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        header = io.BytesIO()
        description = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, description)  # type: ignore[no-untyped-call, unused-ignore]
        members["past.npy"] = header.getvalue() + members["past.npy"][128:]
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        assert message in refusal(path, manifest)


def test_a_long_list_of_members_is_refused_unread(path: Path, manifest: Manifest) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(2000):
            archive.writestr(str(number), b"")
    assert "it holds 2000 arrays, listed in" in refusal(path, manifest)


# Packages


def test_a_session_of_other_weights_is_refused_and_can_be_encoded_again(
    babbler: TextGenerator, tiny_int8: Path, path: Path
) -> None:
    other = TextGenerator.load(tiny_int8)
    message = refusal(path, other.package.manifest)
    assert "saved with another package (graph '" in message
    assert "open it with that one, or let its ids be encoded again" in message
    session = TextSession.restore(other, path, reencode=True)
    fresh = TextSession(other, sampling=SEED, sample=3)
    fresh.append(TextSession.restore(babbler, path).ids)
    assert session.ids == fresh.ids
    assert session.generate(max_new_tokens=8, min_new_tokens=8).ids == fresh.generate(max_new_tokens=8).ids


def test_a_session_of_the_same_package_is_taken_as_it_is_when_it_may_be_encoded_again(
    path: Path, manifest: Manifest
) -> None:
    assert same(read_session(path, manifest, reencode=True), read_session(path, manifest))


def test_a_session_of_another_tokenizer_is_refused_in_any_case(path: Path, demo_fp32: Path) -> None:
    other = open_package(demo_fp32).manifest
    for reencode in (False, True):
        with pytest.raises(SessionError, match=r"saved with another tokenizer \(.*\): its ids mean other text"):
            read_session(path, other, reencode=reencode)


def test_a_copied_package_and_one_converted_again_go_on(
    tiny_checkpoint: Path, path: Path, tmp_path: Path, manifest: Manifest
) -> None:
    again = TextGenerator.load(converted(tiny_checkpoint, tmp_path, "fp32"))
    assert same(read_session(path, again.package.manifest), read_session(path, manifest))


def test_ids_that_another_model_has_not_are_refused_when_encoded_again(path: Path, tmp_path: Path) -> None:
    padded = TextGenerator.load(converted(bytes_checkpoint(tmp_path / "padded", n_vocab=300), tmp_path, "fp32"))
    session = TextSession(padded, sampling=SEED)
    session.append([299])
    session.save(path)
    small = replace(padded.package.manifest, config=replace(padded.config, n_vocab=257))
    assert "token id 299 is not in the model" in refusal(path, small)


def test_a_refusal_ends_a_command_with_status_2(path: Path, babbler: TextGenerator) -> None:
    path.write_bytes(b"no session")
    program = (
        "import sys; from runtime import TextGenerator, TextSession; from runtime.command_line import run_command\n"
        "sys.exit(run_command(lambda: bool(TextSession.restore(TextGenerator.load(sys.argv[1]), sys.argv[2]))))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(babbler.package.folder), str(path)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == (
        f"error: {path} is no whole session file: it has 10 bytes, too few for any session; take a copy of it, or "
        "begin a new session\n"
    )


def test_every_sampling_option_is_saved(path: Path) -> None:
    with np.load(path) as file:
        state = json.loads(file["state"].tobytes())
    assert SamplingOptions(**state["sampling"]) == SEED
    assert set(state["sampling"]) == set(asdict(SEED))
