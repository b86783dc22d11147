"""What the user calls a checkpoint, and where it lies: here, in a cache, or on a server on loopback."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from export import download
from export.checkpoint import read_checkpoint
from export.hub import cached_repository
from export.releases import RELEASES, PublishedFile, Release, canonical_size
from export.resolve import FoundCheckpoint, find_checkpoint
from runtime.config import OFFICIAL_SIZES
from runtime.errors import CheckpointError

from .convert_command import names
from .hub_server import COMMIT, HubServer, hub_server, sha256
from .tiny import tiny_weights, write_safetensors_checkpoint
from .write_tensorbundle import write_openai_checkpoint

NEEDED = ["config.json", "merges.txt", "model.safetensors", "vocab.json"]
DATA = "model.ckpt.data-00000-of-00001"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("beta", "alpha"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "models" / "README.md").touch()
    return tmp_path / "models"


@pytest.fixture
def hub(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with the tiny checkpoint as `some/tiny`, an empty cache, and what HF_HOME and HF_ENDPOINT would set."""
    monkeypatch.setattr(download, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    with hub_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        hub.add_repository("some/tiny", tiny_checkpoint)
        yield hub


@pytest.fixture
def releases(hub: HubServer, tiny_checkpoint: Path, tmp_path: Path) -> dict[str, Release]:
    """A table with one release, the tiny checkpoint, on both servers."""
    checkpoint = read_checkpoint(tiny_checkpoint)
    files = hub.add_repository("openai-community/gpt2-large", tiny_checkpoint)
    openai = write_openai_checkpoint(
        tmp_path / "openai", checkpoint.config, checkpoint.tensors, tokenizer_dir=tiny_checkpoint
    )
    url = hub.add_folder("/gpt-2/models/774M", openai)
    sizes = {DATA: PublishedFile(bytes=(openai / DATA).stat().st_size)}
    vocabulary = {"vocab.bpe": PublishedFile(sha256=sha256((openai / "vocab.bpe").read_bytes()))}
    return {
        "774M": dataclasses.replace(
            RELEASES["774M"],
            revision=COMMIT,
            weights_sha256=sha256(files["model.safetensors"]),
            openai_url=url,
            openai_files=dict.fromkeys(RELEASES["774M"].openai_files, PublishedFile()) | vocabulary | sizes,
        )
    }


def resolve_path(name: str) -> str:
    return f"/{name}/resolve/{COMMIT}/model.safetensors"


# Folders


def test_a_path_is_taken_as_it_stands(models: Path) -> None:
    assert find_checkpoint(str(models / "alpha"), models) == FoundCheckpoint(models / "alpha", "alpha")


def test_a_file_is_taken_too(models: Path) -> None:
    assert find_checkpoint(str(models / "README.md"), models).path == models / "README.md"


def test_a_name_is_looked_up_under_the_models_folder(models: Path) -> None:
    assert find_checkpoint("alpha", models).path == models / "alpha"


def test_a_folder_here_goes_before_the_models_folder(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models.parent)
    (models.parent / "alpha").mkdir()
    assert find_checkpoint("alpha", models).path == Path("alpha")


def test_an_unknown_name_is_refused_with_the_known_ones(models: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint("gamma", models)
    assert str(caught.value) == (
        f"gamma: no checkpoint folder; looked at gamma and {models}/gamma; {models} holds alpha, beta; "
        "else name a size (124M, 355M, 774M, 1558M) or a Hugging Face id (OWNER/NAME)"
    )


def test_an_absolute_path_is_looked_at_once(models: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"; looked at {models}/gamma; "):
        find_checkpoint(f"{models}/gamma", models)


def test_a_missing_models_folder_holds_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere holds no checkpoints; "):
        find_checkpoint("gamma", tmp_path / "nowhere")


@pytest.mark.parametrize("folder", ["gpt2-large", "774M"])
def test_a_size_is_looked_up_under_both_its_names(models: Path, folder: str) -> None:
    (models / folder).mkdir()
    assert find_checkpoint("gpt2-large", models) == FoundCheckpoint(models / folder, "774M")


def test_a_snapshot_that_is_given_as_a_path_is_not_called_by_its_hash(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    assert find_checkpoint(str(snapshot), tmp_path).name == "some/tiny"


# Names


@pytest.mark.parametrize(
    ("size", "others"),
    {
        "124M": ["124M", "117M", "gpt2", "small", "openai-community/gpt2"],
        "355M": ["355M", "345M", "gpt2-medium", "medium", "openai-community/gpt2-medium"],
        "774M": ["774M", "774m", "gpt2-large", "large", "openai-community/gpt2-large"],
        "1558M": ["1558M", "1.5B", "gpt2-xl", "xl", "openai-community/gpt2-xl"],
    }.items(),
)
def test_every_size_has_its_names(size: str, others: list[str]) -> None:
    assert {canonical_size(name, RELEASES) for name in others} == {size}


def test_the_sizes_are_those_of_the_configurations() -> None:
    assert list(RELEASES) == list(OFFICIAL_SIZES)
    assert [release.openai_files[DATA].bytes for release in RELEASES.values()] == [
        497_759_232,
        1_419_292_672,
        3_096_120_320,
        6_230_444_800,
    ]


def test_hashes_and_commits_have_their_length() -> None:
    for release in RELEASES.values():
        hashes = [release.weights_sha256, *(file.sha256 for file in release.openai_files.values() if file.sha256)]
        assert all(re.fullmatch("[0-9a-f]{64}", text) for text in hashes)
        assert re.fullmatch("[0-9a-f]{40}", release.revision)


# The hub


def test_a_hugging_face_id_is_downloaded_once(hub: HubServer, models: Path) -> None:
    hub.repositories["some/tiny"] |= {"pytorch_model.bin": b"torch", "README.md": b"#", "tf_model.h5": b"keras"}
    steps: list[tuple[str, int, int]] = []
    found = find_checkpoint("some/tiny", models, progress=lambda *step: steps.append(step))
    assert found == FoundCheckpoint(cached_repository("some/tiny") / "snapshots" / COMMIT, "some/tiny")
    assert names(found.path) == NEEDED
    for name in NEEDED:
        assert (found.path / name).read_bytes() == hub.repositories["some/tiny"][name]
    assert {what: (done, total) for what, done, total in steps} == {
        name: (len(hub.repositories["some/tiny"][name]),) * 2 for name in NEEDED
    }
    asked = len(hub.requests)
    assert find_checkpoint("some/tiny", models) == found
    assert find_checkpoint(f"some/tiny@{COMMIT}", models, offline=True) == found
    assert len(hub.requests) == asked


def test_the_cache_is_left_as_huggingface_hub_would(hub: HubServer, models: Path, tmp_path: Path) -> None:
    """It is the cache of every program here: they must find our files, and we theirs."""
    find_checkpoint("some/tiny", models)
    program = f"from huggingface_hub import hf_hub_download as d; [d('some/tiny', name) for name in {NEEDED}]"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "theirs")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)

    def tree(cache: Path) -> dict[str, str]:
        paths = (path for folder in ("blobs", "refs", "snapshots") for path in (cache / folder).rglob("*"))
        return {
            str(path.relative_to(cache)): str(path.readlink()) if path.is_symlink() else sha256(path.read_bytes())
            for path in paths
            if not path.is_dir()
        }

    assert tree(cached_repository("some/tiny")) == tree(tmp_path / "theirs" / "models--some--tiny")
    assert snapshot_download("some/tiny", local_files_only=True) == str(find_checkpoint("some/tiny", models).path)


def test_shards_come_with_their_index(hub: HubServer, models: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    config = read_checkpoint(tiny_checkpoint).config
    folder = write_safetensors_checkpoint(
        tmp_path / "shards", config, tiny_weights(config), 3, tokenizer_dir=tiny_checkpoint
    )
    hub.add_repository("some/shards", folder)
    found = find_checkpoint("some/shards", models).path
    assert names(found) == names(folder)
    (found / "model-00002-of-00003.safetensors").unlink()
    asked = len(hub.requests)
    assert find_checkpoint("some/shards", models).path == found
    assert names(found) == names(folder)
    assert len(hub.requests) == asked + 1  # the listing; the file itself was still in the cache


def test_a_repository_of_torch_files_alone_is_downloaded(hub: HubServer, models: Path) -> None:
    small = dict.fromkeys(("config.json", "tokenizer.json"), b"{}")
    hub.repositories["some/torch"] = small | {"pytorch_model.bin": b"torch", "training_args.bin": b"pickle"}
    assert names(find_checkpoint("some/torch", models).path) == sorted([*small, "pytorch_model.bin"])


def test_shards_of_torch_come_with_their_index(hub: HubServer, models: Path) -> None:
    index = json.dumps({"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}).encode()
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model-1.bin": b"1", "pytorch_model-2.bin": b"2"}
    hub.repositories["some/torch"] = files | {"pytorch_model.bin.index.json": index, "optimizer.bin": b"pickle"}
    assert names(find_checkpoint("some/torch", models).path) == sorted([*files, "pytorch_model.bin.index.json"])


def test_a_repository_without_weights_is_refused(hub: HubServer, models: Path) -> None:
    hub.repositories["some/keras"] = {"config.json": b"{}", "tf_model.h5": b"keras"}
    with pytest.raises(
        CheckpointError,
        match=r"^some/keras@main holds no weights .*; found config\.json, tf_model\.h5; convert a folder",
    ):
        find_checkpoint("some/keras", models)
    assert not cached_repository("some/keras").exists()


def test_other_bytes_than_the_listing_says_are_refused(hub: HubServer, models: Path) -> None:
    weights = hub.repositories["some/tiny"]["model.safetensors"]
    hub.lies[f"/cdn/{sha256(weights)}"] = weights[:-1] + bytes([weights[-1] ^ 1])
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: sha256 is .*, expected {sha256(weights)}; it was "
    ):
        find_checkpoint("some/tiny", models)
    assert not (cached_repository("some/tiny") / "snapshots").exists()
    assert sha256(weights) not in " ".join(names(cached_repository("some/tiny") / "blobs"))


@pytest.mark.parametrize("name", ["nobody/nothing", "some/tiny@gone"])
def test_what_the_hub_does_not_have_is_told(hub: HubServer, models: Path, name: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"^\S+: no such repository, revision or file; .* HTTP 404 .*; nor is there a folder "
    ):
        find_checkpoint(name, models)


def test_a_private_repository_takes_a_token(hub: HubServer, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "secret"
    with pytest.raises(CheckpointError, match=r"^some/tiny@main: not there, or private, or gated; .*set HF_TOKEN"):
        find_checkpoint("some/tiny", models)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert names(find_checkpoint("some/tiny", models).path) == NEEDED
    stores = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert stores
    assert all("Authorization" not in request.headers for request in stores)


def test_a_gated_file_says_that_a_token_is_needed(hub: HubServer, models: Path) -> None:
    hub.statuses[resolve_path("some/tiny")] = [403]
    with pytest.raises(CheckpointError, match=r"gated; check the name, or set HF_TOKEN .*model\.safetensors: HTTP 403"):
        find_checkpoint("some/tiny", models)


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"sha": "main", "siblings": []}', b'{"sha": 1, "siblings": 1}'])
def test_an_endpoint_that_is_no_hub_is_told(hub: HubServer, models: Path, answer: bytes) -> None:
    hub.plain["/api/models/some/tiny/revision/main"] = answer
    with pytest.raises(CheckpointError, match=r"/revision/main\?blobs=true: the .* see where HF_ENDPOINT points"):
        find_checkpoint("some/tiny", models)


@pytest.mark.parametrize("name", ["some/tiny@../../x", "../tiny", "some/tiny/more", "some/tiny@", "/tiny"])
def test_what_climbs_or_is_no_id_is_not_asked_for(hub: HubServer, models: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=": no checkpoint folder; "):
        find_checkpoint(name, models)
    assert hub.requests == []


# Sizes


def test_a_size_is_downloaded_from_the_hub(hub: HubServer, models: Path, releases: dict[str, Release]) -> None:
    found = find_checkpoint("large", models, releases=releases)
    assert found.name == "774M"
    assert found.path == cached_repository("openai-community/gpt2-large") / "snapshots" / COMMIT
    assert names(found.path) == NEEDED
    assert not any(request.path.startswith("/gpt-2/") for request in hub.requests)


@pytest.mark.parametrize("repository", ["openai-community/gpt2-large", "gpt2-large"])
def test_any_whole_snapshot_of_a_size_will_do(
    hub: HubServer, models: Path, releases: dict[str, Release], tiny_checkpoint: Path, repository: str
) -> None:
    snapshots = cached_repository(repository) / "snapshots"
    (snapshots / "begun").mkdir(parents=True)
    (snapshots / "begun" / "config.json").write_text("{}")
    (snapshots / "whole").symlink_to(tiny_checkpoint)
    assert find_checkpoint("774M", models, releases=releases) == FoundCheckpoint(snapshots / "whole", "774M")
    assert hub.requests == []


def test_weights_that_are_not_the_pinned_ones_are_not_downloaded(
    hub: HubServer, models: Path, releases: dict[str, Release]
) -> None:
    pinned = {"774M": dataclasses.replace(releases["774M"], weights_sha256="0" * 64)}
    with pytest.raises(CheckpointError, match=rf"expected {'0' * 64}; nothing was downloaded: see where HF_ENDPOINT"):
        find_checkpoint("774M", models, releases=pinned)
    assert len(hub.requests) == 1
    assert not cached_repository("openai-community/gpt2-large").exists()


def test_without_the_hub_openai_has_it(
    hub: HubServer, models: Path, releases: dict[str, Release], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    del hub.repositories["openai-community/gpt2-large"]
    hub.cuts[f"/gpt-2/models/774M/{DATA}"] = [70_000]
    with caplog.at_level(logging.WARNING):
        found = find_checkpoint("774M", models, releases=releases)
    assert found == FoundCheckpoint(tmp_path / "home" / "gpt2-edge" / "openai" / "774M", "774M")
    assert names(found.path) == names(tmp_path / "openai")
    assert read_checkpoint(found.path).layout == "openai-tensorflow"
    assert hub.ranges(f"/gpt-2/models/774M/{DATA}") == [0, 70_000]
    [warning] = caplog.messages
    assert warning.startswith("774M: these are OpenAI's own files, for the hub failed: openai-community/gpt2-large@")
    asked = len(hub.requests)
    assert find_checkpoint("gpt2-large", models, releases=releases, offline=True) == found
    assert len(hub.requests) == asked


def test_openais_files_are_proved(hub: HubServer, models: Path, releases: dict[str, Release], tmp_path: Path) -> None:
    del hub.repositories["openai-community/gpt2-large"]
    hub.lies["/gpt-2/models/774M/vocab.bpe"] = b"other"
    with pytest.raises(CheckpointError, match=r"/774M/vocab\.bpe: sha256 is .*; it was deleted: run again"):
        find_checkpoint("774M", models, releases=releases)
    assert "vocab.bpe" not in " ".join(names(tmp_path / "home" / "gpt2-edge" / "openai" / "774M"))


def test_nowhere_to_download_from_names_both(
    hub: HubServer, models: Path, releases: dict[str, Release], caplog: pytest.LogCaptureFixture
) -> None:
    del hub.repositories["openai-community/gpt2-large"]
    hub.plain.clear()
    with pytest.raises(
        CheckpointError,
        match=r"^774M: cannot be downloaded: .*gpt2-large.* HTTP 404 .*; nor from OpenAI: .*checkpoint: ",
    ):
        find_checkpoint("774M", models, releases=releases)


# Offline


def test_offline_every_place_is_named(
    hub: HubServer, models: Path, releases: dict[str, Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "home" / "hub"
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint("gpt2-large", Path("models"), releases=releases, offline=True)
    assert str(caught.value) == (
        "774M: not on this machine, and offline; looked at gpt2-large, models/gpt2-large, models/774M, "
        f"{cache}/models--openai-community--gpt2-large, {cache}/models--gpt2-large, "
        f"{tmp_path}/home/gpt2-edge/openai/774M; where there is a network: hf download openai-community/gpt2-large "
        f"config.json model.safetensors tokenizer.json --revision {COMMIT}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint("some/tiny", Path("models"))
    assert str(caught.value) == (
        "some/tiny@main: not on this machine, and offline; looked at some/tiny, models/some/tiny, "
        f"{cache}/models--some--tiny; where there is a network: hf download some/tiny --revision main"
    )
    assert hub.requests == []
