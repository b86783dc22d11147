"""`export.convert` by name, from end to end: real processes, a real server on loopback, an empty cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from export.checkpoint import read_checkpoint
from export.convert import convert
from export.releases import RELEASES, PublishedFile
from export.resolve import find_checkpoint
from runtime.package import open_package

from .conftest import BYTES_AND_END
from .hub_server import COMMIT, HubServer, cdn_path, hub_server, sha256
from .tiny import tiny_config, tiny_weights, write_safetensors_checkpoint
from .write_tensorbundle import write_openai_checkpoint

REPOSITORY = Path(__file__).parent.parent
PATIENCE_S = 60


@pytest.fixture
def hub(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[HubServer]:
    """A hub whose `some/babbler` has half a megabyte of weights: several pieces of a download."""
    config = replace(tiny_config(), n_layer=8, n_vocab=BYTES_AND_END, eos_token_id=BYTES_AND_END - 1)
    folder = write_safetensors_checkpoint(
        tmp_path / "published", config, tiny_weights(config), tokenizer_dir=tiny_checkpoint
    )
    with hub_server() as hub:
        hub.add_repository("some/babbler", folder)
        yield hub


def start(hub: HubServer, home: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`python -m export.convert` in `home`, as somebody whose Hugging Face cache is there."""
    places = {"HF_HOME": str(home / "cache"), "HF_ENDPOINT": hub.url, "PYTHONPATH": str(REPOSITORY)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    home.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "export.convert", *arguments],
        cwd=home,
        env=kept | places | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(hub: HubServer, home: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    process = start(hub, home, *arguments, **environment)
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def assert_refused(done: tuple[int, str, str], *parts: str) -> None:
    status, out, err = done
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    for part in parts:
        assert part in err


def test_a_killed_download_goes_on_where_it_was(hub: HubServer, tmp_path: Path) -> None:
    weights, home = hub.repositories["some/babbler"]["model.safetensors"], tmp_path / "home"
    hub.holds[cdn_path(weights)] = [150_000, 150_000]
    for _ in range(2):
        process = start(hub, home, "some/babbler", "--allow-loss")
        assert hub.holding.wait(PATIENCE_S)
        [part] = (home / "cache").rglob("*.part")
        before = hub.ranges(cdn_path(weights))[-1]
        while part.stat().st_size <= before:  # the server has sent it, and it comes
            assert process.poll() is None
        process.kill()
        process.communicate()
        hub.holding.clear()
        assert [path.name for path in home.iterdir()] == ["cache"]
    status, out, err = run(hub, home, "some/babbler", "--allow-loss", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["package"] == "packages/babbler-int8"
    manifest = open_package(home / "packages" / "babbler-int8", full=True).manifest
    assert manifest.source.name == "some/babbler"
    first, second, third = hub.ranges(cdn_path(weights))
    assert (first, 0 < second < third < len(weights)) == (0, True)
    assert not list((home / "cache").rglob("*.part"))
    blob = home / "cache" / "hub" / "models--some--babbler" / "blobs" / sha256(weights)
    assert blob.read_bytes() == weights


def test_a_size_is_called_by_its_size_wherever_it_came_from(hub: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(
        tmp_path / "published", home / "cache" / "hub" / "models--openai-community--gpt2-large" / "snapshots" / COMMIT
    )
    status, out, err = run(hub, home, "gpt2-large", "--offline", "--precision", "fp32", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["package"] == "packages/774M-fp32"
    assert open_package(home / "packages" / "774M-fp32").manifest.source.name == "774M"
    assert hub.requests == []


def test_weights_that_are_not_openais_are_refused(hub: HubServer, tmp_path: Path) -> None:
    revision = RELEASES["774M"].revision
    hub.commits["openai-community/gpt2-large"] = revision
    hub.repositories["openai-community/gpt2-large"] = hub.repositories["some/babbler"]
    done = run(hub, tmp_path / "home", "774M")
    assert_refused(done, f"@{revision}: the hub offers a model.safetensors whose sha256 is ", "nothing was downloaded")
    assert list((tmp_path / "home").iterdir()) == []


def test_a_wrong_hash_leaves_nothing(hub: HubServer, tmp_path: Path) -> None:
    weights, home = hub.repositories["some/babbler"]["model.safetensors"], tmp_path / "home"
    hub.lies[cdn_path(weights)] = weights[::-1]
    assert_refused(run(hub, home, "some/babbler"), "model.safetensors: sha256 is ", f"expected {sha256(weights)}")
    assert not (home / "packages").exists()
    assert not list(home.rglob("*.part")) + list(home.rglob("*.safetensors"))
    hub.lies.clear()
    assert run(hub, home, "some/babbler", "--allow-loss")[0] == 0


def test_refusals_are_one_line_and_keep_the_package(hub: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert run(hub, home, "some/babbler", "--precision", "fp32")[0] == 0
    package = home / "packages" / "babbler-fp32"
    before = (package / "manifest.json").read_bytes()
    again = ("--precision", "fp32", "--output", str(package), "--force")
    assert_refused(run(hub, home, "some/nothing", *again), "some/nothing@main: no such repository", "HTTP 404")
    assert_refused(
        run(hub, home, "some/nothing", *again, HF_HUB_OFFLINE="1"), "offline; looked at ", "hf download some/nothing"
    )
    assert_refused(run(hub, home, "some/nothing", *again, HF_ENDPOINT="http://127.0.0.1:9"), "Connection refused")
    hub.token = "secret"
    assert_refused(run(hub, home, "some/nothing", *again), "set HF_TOKEN to a token that may read it", "HTTP 401")
    assert (package / "manifest.json").read_bytes() == before
    assert [path.name for path in (home / "packages").iterdir()] == ["babbler-fp32"]


def test_a_full_disk_is_one_line(hub: HubServer, tmp_path: Path) -> None:
    weights, home = hub.repositories["some/babbler"]["model.safetensors"], tmp_path / "home"
    blobs = home / "cache" / "hub" / "models--some--babbler" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{sha256(weights)}.part").symlink_to("/dev/full")
    status, out, err = run(hub, home, "some/babbler")
    assert (status, out) == (1, "")
    assert err == f"error: {blobs / sha256(weights)}.part: No space left on device; free space and run again\n"
    assert not (home / "packages").exists()


def test_openais_layout_becomes_the_same_package(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One size, found on either server; only the table is a test's."""
    checkpoint = read_checkpoint(tmp_path / "published")
    openai = write_openai_checkpoint(
        tmp_path / "openai", checkpoint.config, checkpoint.tensors, tokenizer_dir=tmp_path / "published"
    )
    known = {path.name: PublishedFile(sha256=sha256(path.read_bytes())) for path in openai.iterdir()}
    release = replace(
        RELEASES["774M"],
        revision=COMMIT,
        weights_sha256=sha256(hub.repositories["some/babbler"]["model.safetensors"]),
        openai_url=hub.add_folder("/openai", openai),
        openai_files=known,
    )
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    fingerprints = set()
    for where in ("openai", "hub"):
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / where / "home"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / where / "home" / "hub"))
        found = find_checkpoint("774M", tmp_path / "models", releases={"774M": release})
        manifest = convert(found.path, tmp_path / where / "x", name=found.name, precision="fp32").manifest
        assert manifest.source.name == "774M"
        assert manifest.source.layout == {"openai": "openai-tensorflow", "hub": "safetensors"}[where]
        fingerprints.add(manifest.source.fingerprint)
        hub.repositories["openai-community/gpt2-large"] = hub.repositories["some/babbler"]
    assert len(fingerprints) == 1
