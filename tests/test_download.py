"""One file from a server: what is resumed, what is proved, what is refused."""

from __future__ import annotations

import errno
import fcntl
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from export import download
from export.download import ATTEMPTS, PIECE_BYTES, UnreachableError, fetch, read_url
from runtime.errors import CheckpointError

from .convert_command import names
from .hub_server import HubServer, git_id, hub_server, sha256

CONTENT = np.random.default_rng(0).bytes(5 * PIECE_BYTES + 123)
PATH = "/models/weights"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(download, "FIRST_PAUSE_S", 0.001)
    with hub_server() as hub:
        hub.plain[PATH] = CONTENT
        yield hub


@pytest.mark.parametrize("digest", [sha256(CONTENT), git_id(CONTENT), None])
def test_a_file_comes_whole(hub: HubServer, tmp_path: Path, digest: str | None) -> None:
    steps: list[tuple[str, int, int]] = []
    fetch(
        hub.url + PATH,
        tmp_path / "new" / "x",
        digest=digest,
        size=len(CONTENT),
        progress=lambda *step: steps.append(step),
    )
    assert (tmp_path / "new" / "x").read_bytes() == CONTENT
    assert names(tmp_path / "new") == ["x"]
    assert {(what, total) for what, _, total in steps} == {("weights", len(CONTENT))}
    assert [done for _, done, _ in steps] == sorted({done for _, done, _ in steps})
    assert steps[-1][1] == len(CONTENT)


def test_what_is_there_is_not_asked_for(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"as it is")
    fetch(hub.url + PATH, tmp_path / "x", digest=sha256(CONTENT))
    assert hub.requests == []


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_dropped_connection_is_taken_up_where_it_broke(hub: HubServer, tmp_path: Path, size: int | None) -> None:
    hub.cuts[PATH] = [100_000, 0, 50_000]
    fetch(hub.url + PATH, tmp_path / "x", digest=sha256(CONTENT), size=size)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert hub.ranges(PATH) == [0, 100_000, 100_000, 150_000]


def test_what_an_earlier_run_left_is_taken_up(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "x.part").write_bytes(CONTENT[:1000])
    fetch(hub.url + PATH, tmp_path / "x", digest=sha256(CONTENT), size=len(CONTENT))
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert hub.ranges(PATH) == [1000]


def test_what_an_earlier_run_left_whole_is_only_proved(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "x.part").write_bytes(CONTENT)
    fetch(hub.url + PATH, tmp_path / "x", digest=sha256(CONTENT), size=len(CONTENT))
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert hub.requests == []


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_left_overs_that_cannot_be_right_are_dropped(hub: HubServer, tmp_path: Path, size: int | None) -> None:
    (tmp_path / "x.part").write_bytes(CONTENT + b"more")
    fetch(hub.url + PATH, tmp_path / "x", digest=sha256(CONTENT), size=size)
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_all_again(hub: HubServer, tmp_path: Path) -> None:
    hub.knows_ranges, hub.cuts[PATH] = False, [100_000]
    fetch(hub.url + PATH, tmp_path / "x", digest=sha256(CONTENT), size=len(CONTENT))
    assert (tmp_path / "x").read_bytes() == CONTENT


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_recovers_is_asked_again(hub: HubServer, status: int) -> None:
    hub.statuses[PATH] = [status, status]
    assert read_url(hub.url + PATH) == CONTENT


def test_a_server_that_does_not_recover_is_told_once(hub: HubServer, tmp_path: Path) -> None:
    hub.cuts[PATH] = [100_000, *[0] * ATTEMPTS]
    with pytest.raises(UnreachableError) as caught:
        fetch(hub.url + PATH, tmp_path / "x", digest=sha256(CONTENT), size=len(CONTENT))
    assert str(caught.value) == (
        f"{hub.url}{PATH}: the connection closed {len(CONTENT) - 100_000} bytes early, {ATTEMPTS} times; "
        "run again to go on where it stopped"
    )
    assert names(tmp_path) == ["x.part"]
    assert (tmp_path / "x.part").stat().st_size == 100_000


def test_attempts_that_bring_something_are_not_counted(hub: HubServer, tmp_path: Path) -> None:
    hub.cuts[PATH] = [1000] * (3 * ATTEMPTS)
    fetch(hub.url + PATH, tmp_path / "x", digest=sha256(CONTENT), size=len(CONTENT))
    assert (tmp_path / "x").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("digest", "size", "fault"),
    [
        (sha256(b"other"), None, f"sha256 is {sha256(CONTENT)}, expected {sha256(b'other')}"),
        (git_id(b"other"), None, f"git id is {git_id(CONTENT)}, expected {git_id(b'other')}"),
        (None, len(CONTENT) + 1, f"{len(CONTENT)} bytes came, expected {len(CONTENT) + 1}"),
        (None, len(CONTENT) - 1, f"{len(CONTENT)} bytes came, expected {len(CONTENT) - 1}"),
    ],
)
def test_other_bytes_than_expected_are_deleted(
    hub: HubServer, tmp_path: Path, digest: str | None, size: int | None, fault: str
) -> None:
    with pytest.raises(CheckpointError, match=f"^{re.escape(hub.url + PATH)}: {fault}; it was deleted: run again"):
        fetch(hub.url + PATH, tmp_path / "x", digest=digest, size=size)
    assert names(tmp_path) == []


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_told_at_once(hub: HubServer, tmp_path: Path, status: int) -> None:
    hub.statuses[PATH] = [status]
    with pytest.raises(UnreachableError, match=f"{PATH}: HTTP {status} ") as caught:
        fetch(hub.url + PATH, tmp_path / "x")
    assert caught.value.status == status
    assert len(hub.requests) == 1


def test_a_server_that_is_not_there_is_told_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x"
        with pytest.raises(UnreachableError, match=f"^{url}: Connection refused$"):
            read_url(url)


def test_two_downloads_of_one_file_do_not_mix(hub: HubServer, tmp_path: Path) -> None:
    with (tmp_path / "x.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=r"x\.part: another process is downloading it; wait for it"):
            fetch(hub.url + PATH, tmp_path / "x")
    assert hub.requests == []


def test_a_full_disk_is_the_machines_fault(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "x.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        fetch(hub.url + PATH, tmp_path / "x", size=len(CONTENT))
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "x").exists()


def test_headers_are_for_the_first_server_only(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["some/model"] = {"model.safetensors": CONTENT}
    url = f"{hub.url}/some/model/resolve/main/model.safetensors"
    fetch(url, tmp_path / "x", headers={"Authorization": "Bearer secret"})
    first, second = hub.requests
    assert first.headers["Authorization"] == "Bearer secret"
    assert second.path.startswith("/cdn/")
    assert "Authorization" not in second.headers
