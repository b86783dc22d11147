"""What the user calls a checkpoint -> where it lies, downloaded if need be.

    a path            as it stands, and before all else
    a size            124M, 355M, 774M, 1558M, or another name of it (gpt2-large, 1.5B): the models folder, the Hugging
                      Face cache, OpenAI's files of an earlier run; else Hugging Face's hub, else OpenAI's server
    OWNER/NAME        the models folder, the Hugging Face cache, else the hub; OWNER/NAME@REVISION for another than main
    any other name    the models folder

OpenAI's files are kept beside the Hugging Face cache, in gpt2-edge/openai/SIZE under HF_HOME.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from runtime.errors import CheckpointError

from .checkpoint import checkpoint_name
from .download import Progress, UnreachableError, fetch
from .hub import cached_repository, download_snapshot, find_any_snapshot, find_snapshot, is_offline, parse_id
from .releases import RELEASES, Release, canonical_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """Where a checkpoint lies.

    Attributes:
        path: its folder, or its file where it is one file.
        name: what it is called: "774M" whichever way it was asked for, OWNER/NAME, or as its folder or file is.
    """

    path: Path
    name: str


def find_checkpoint(
    name: str,
    models_dir: Path,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    releases: Mapping[str, Release] = RELEASES,
) -> FoundCheckpoint:
    """Find a checkpoint on this machine, or download it.

    Args:
        name: a path, a size, a Hugging Face id, or a name under the models folder.
        models_dir: the models folder.
        offline: no network access; HF_HUB_OFFLINE says the same.
        progress: called as bytes come.
        releases: what is known of the sizes.
    Raises:
        CheckpointError: nothing there; every place that was tried is named. Or what came is not what was expected.
        OSError: the disk is full or cannot be written.
    """
    size, hub_id = canonical_size(name, releases), parse_id(name)
    places = dict.fromkeys((Path(name), models_dir / name, *([models_dir / size] if size else [])))
    for place in places:
        if place.exists():
            return FoundCheckpoint(place, size if size and place != Path(name) else _name_of(place))
    tried = [str(place) for place in places]
    offline = offline or is_offline()
    if size:
        return FoundCheckpoint(_find_release(size, releases[size], tried, offline=offline, progress=progress), size)
    if hub_id:
        return FoundCheckpoint(_find_repository(*hub_id, tried, offline=offline, progress=progress), hub_id[0])
    known = sorted(path.name for path in models_dir.iterdir() if path.is_dir()) if models_dir.is_dir() else []
    raise CheckpointError(
        f"{name}: no checkpoint folder; looked at {' and '.join(tried)}; {models_dir} holds "
        f"{', '.join(known) or 'no checkpoints'}; else name a size ({', '.join(releases)}) or a Hugging Face id "
        "(OWNER/NAME)"
    )


def _find_release(
    size: str, release: Release, tried: Sequence[str], *, offline: bool, progress: Progress | None
) -> Path:
    for repository in release.repositories:
        snapshot = find_snapshot(repository, release.revision) or find_any_snapshot(repository)
        if snapshot:
            return snapshot
    openai_dir = Path(constants.HF_HOME) / "gpt2-edge" / "openai" / size
    if all((openai_dir / file_name).is_file() for file_name in release.openai_files):
        return openai_dir
    if offline:
        raise _not_here(
            size,
            [*tried, *(str(cached_repository(repository)) for repository in release.repositories), str(openai_dir)],
            f"{release.repository} config.json model.safetensors tokenizer.json --revision {release.revision}",
        )
    try:
        return download_snapshot(
            release.repository, release.revision, weights_sha256=release.weights_sha256, progress=progress
        )
    except UnreachableError as hub_error:
        try:
            _download_openai(release, openai_dir, progress)
        except UnreachableError as error:
            raise UnreachableError(f"{size}: cannot be downloaded: {hub_error}; nor from OpenAI: {error}") from error
        logger.warning("%s: these are OpenAI's own files, for the hub failed: %s", size, hub_error)
        return openai_dir


def _find_repository(
    repository: str, revision: str, tried: Sequence[str], *, offline: bool, progress: Progress | None
) -> Path:
    snapshot = find_snapshot(repository, revision)
    if snapshot:
        return snapshot
    if offline:
        places = [*tried, str(cached_repository(repository))]
        raise _not_here(f"{repository}@{revision}", places, f"{repository} --revision {revision}")
    try:
        return download_snapshot(repository, revision, progress=progress)
    except UnreachableError as error:
        raise UnreachableError(f"{error}; nor is there a folder {' or '.join(tried)}", error.status) from error


def _download_openai(release: Release, folder: Path, progress: Progress | None) -> None:
    for file_name, known in release.openai_files.items():
        fetch(
            f"{release.openai_url}/{file_name}",
            folder / file_name,
            digest=known.sha256,
            size=known.bytes,
            progress=progress,
        )


def _not_here(name: str, places: Sequence[str], wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: not on this machine, and offline; looked at {', '.join(places)}; where there is a network: "
        f"hf download {wanted}"
    )


def _name_of(path: Path) -> str:
    """What a checkpoint is called; a snapshot in the Hugging Face cache, whose name is a hash, is called OWNER/NAME."""
    real = path.resolve()
    cached = real.parent.parent.name
    if real.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/")
    return checkpoint_name(path)
