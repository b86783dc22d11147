"""Repositories of the Hugging Face hub: in the cache on this machine, or downloaded into it.

huggingface_hub says where the cache lies, which server is asked, and with which token; so HF_HOME, HF_HUB_CACHE,
HF_ENDPOINT, HF_TOKEN and `hf auth login` mean what they always mean. Only what a conversion reads is downloaded, and
what lies in the cache afterwards is there for every other program.

    models--OWNER--NAME/blobs/<sha256 or git id>            the files, by what is in them
    models--OWNER--NAME/snapshots/<commit>/model.safetensors    links to them
    models--OWNER--NAME/refs/main                           the commit that a name of a revision stood for

Source: "Understand caching" in huggingface_hub's documentation.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import constants, get_token

from runtime.errors import CheckpointError

from .checkpoint_files import read_json_object
from .download import Progress, UnreachableError, fetch, read_url
from .layouts import HUGGING_FACE

MAIN = "main"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX_SUFFIX = ".index.json"
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
SMALL_FILES = (CONFIG, "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "LICENSE", "LICENSE.txt")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository, as the hub lists it. `digest` is its sha256, or git's id of a small one."""

    name: str
    digest: str
    size: int


def parse_id(name: str) -> tuple[str, str] | None:
    """Repository and revision of OWNER/NAME or OWNER/NAME@REVISION; None if it is spelled otherwise."""
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", name, re.ASCII)
    return (found[1], found[2] or MAIN) if found and ".." not in name else None


def is_offline() -> bool:
    """Whether the user forbade all network access with HF_HUB_OFFLINE."""
    return constants.HF_HUB_OFFLINE


def cached_repository(repository: str) -> Path:
    """Where the cache has a repository, if it has it."""
    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def find_snapshot(repository: str, revision: str) -> Path | None:
    """The folder of a revision in the cache, if all that a conversion reads is there."""
    folder = cached_repository(repository)
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return snapshot if _is_whole(snapshot) else None


def find_any_snapshot(repository: str) -> Path | None:
    """The newest folder of any revision in the cache that has all that a conversion reads."""
    snapshots = [path for path in cached_repository(repository).glob("snapshots/*") if _is_whole(path)]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def download_snapshot(
    repository: str, revision: str, *, weights_sha256: str | None = None, progress: Progress | None = None
) -> Path:
    """Download into the cache what a conversion reads of a repository.

    Args:
        repository: OWNER/NAME.
        revision: a commit, branch or tag.
        weights_sha256: what model.safetensors must be; without it, what the hub lists is taken.
        progress: called as bytes come.
    Returns:
        The folder in the cache.
    Raises:
        UnreachableError: no hub, or it does not give this; says whether a token could help.
        CheckpointError: no checkpoint that can be read, or not the expected bytes.
        OSError: the disk is full or cannot be written.
    """
    folder = cached_repository(repository)
    with _told(repository, revision):
        commit, listed = _list_files(repository, revision)
        files = _choose_files(f"{repository}@{revision}", listed)
        offered = listed[WEIGHTS].digest if WEIGHTS in listed else "none, for it is not there"
        if weights_sha256 not in (None, offered):
            raise CheckpointError(
                f"{repository}@{revision}: the hub offers a {WEIGHTS} whose sha256 is {offered}, "
                f"expected {weights_sha256}; nothing was downloaded: see where HF_ENDPOINT points"
            )
        for file in files:
            fetch(
                f"{constants.ENDPOINT}/{repository}/resolve/{commit}/{quote(file.name)}",
                folder / "blobs" / file.digest,
                headers=_authorization(),
                digest=file.digest,
                size=file.size,
                progress=progress,
            )
    snapshot = folder / "snapshots" / commit
    for file in files:
        _link(snapshot / file.name, folder / "blobs" / file.digest)
    if revision != commit:
        reference = folder / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
    return snapshot


def _list_files(repository: str, revision: str) -> tuple[str, dict[str, HubFile]]:
    """The commit that a revision stands for, and the files at its root by their names."""
    url = f"{constants.ENDPOINT}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
    try:
        listing = json.loads(read_url(url, headers=_authorization()))
        commit, files = listing["sha"], {}
        for entry in listing["siblings"]:
            name, digest = entry["rfilename"], (entry.get("lfs") or {}).get("sha256") or entry["blobId"]
            if "/" not in name:
                files[name] = HubFile(name, digest, int(entry["size"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreachableError(
            f"{url}: the answer is no listing of a repository; see where HF_ENDPOINT points"
        ) from error
    # They become names of files here.
    if not all(
        re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", text) for text in (commit, *(f.digest for f in files.values()))
    ):
        raise UnreachableError(f"{url}: the listing holds a hash that is none; see where HF_ENDPOINT points")
    return commit, files


def _choose_files(where: str, listed: Mapping[str, HubFile]) -> list[HubFile]:
    """What a conversion reads, in the order in which it becomes visible: a snapshot with weights has all the rest."""
    weights = next((name for name in HUGGING_FACE if name in listed), None)
    if weights is None:
        raise CheckpointError(
            f"{where} holds no weights that are read here, one of {', '.join(HUGGING_FACE)}; "
            f"found {', '.join(sorted(listed)[:8]) or 'nothing'}; convert a folder that has them"
        )
    whole = Path(weights.removesuffix(INDEX_SUFFIX))
    shards = sorted(name for name in listed if name.startswith(f"{whole.stem}-") and name.endswith(whole.suffix))
    weights_files = [*shards, weights] if weights.endswith(INDEX_SUFFIX) else [weights]
    return [listed[name] for name in (*SMALL_FILES, *weights_files) if name in listed]


def _is_whole(snapshot: Path) -> bool:
    def has(*names: str) -> bool:
        return all((snapshot / name).is_file() for name in names)

    if not has(CONFIG) or not any(has(*names) for names in TOKENIZERS):
        return False
    weights = next((name for name in HUGGING_FACE if has(name)), None)
    if weights is None or not weights.endswith(INDEX_SUFFIX):
        return weights is not None
    shards = read_json_object(snapshot / weights).get("weight_map")
    return isinstance(shards, dict) and has(*map(str, shards.values()))


def _link(pointer: Path, blob: Path) -> None:
    pointer.parent.mkdir(parents=True, exist_ok=True)
    if not pointer.is_file():
        pointer.unlink(missing_ok=True)  # a link whose file somebody deleted
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))


def _authorization() -> dict[str, str]:
    token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


@contextmanager
def _told(repository: str, revision: str) -> Iterator[None]:
    """Say what the hub's answers mean; it answers 401 for what is not there, lest anybody learn what is private."""
    try:
        yield
    except UnreachableError as error:
        if error.status in (401, 403):
            meaning = "not there, or private, or gated; check the name, or set HF_TOKEN to a token that may read it"
        elif error.status == 404:
            meaning = "no such repository, revision or file; check the name and the revision"
        else:
            raise
        raise UnreachableError(f"{repository}@{revision}: {meaning} ({error})", error.status) from error
