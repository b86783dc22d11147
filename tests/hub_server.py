"""A server on loopback that answers as the Hugging Face hub and OpenAI's file server do, well and badly."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
LARGE = (".safetensors", ".bin")


@dataclass(frozen=True)
class Request:
    """One that came: `path` begins with /, `range` is the first byte that was asked for."""

    method: str
    path: str
    range: int
    headers: Message


@dataclass
class HubServer:
    """What it serves, how badly, and what it was asked.

    Attributes:
        url: of the hub.
        repositories: OWNER/NAME -> its files; each has one commit, which is main.
        commits: OWNER/NAME -> that commit, where it is not COMMIT.
        plain: path -> a file that is served as it is, as OpenAI's are.
        statuses: path -> what to answer instead, once each.
        cuts: path -> after how many bytes to close the connection, once each.
        holds: path -> after how many bytes to send nothing more, once each; `holding` is set then.
        lies: path -> other bytes than the listing promises.
        knows_ranges: whether a part of a file can be asked for.
        token: without it, every repository is private.
    """

    url: str
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    plain: dict[str, bytes] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    holds: dict[str, list[int]] = field(default_factory=dict)
    lies: dict[str, bytes] = field(default_factory=dict)
    knows_ranges: bool = True
    token: str | None = None
    requests: list[Request] = field(default_factory=list)
    holding: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def add_repository(self, name: str, folder: Path) -> dict[str, bytes]:
        """Serve a folder's files as a repository."""
        self.repositories[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
        return self.repositories[name]

    def add_folder(self, path: str, folder: Path) -> str:
        """Serve a folder's files as they are; its URL."""
        self.plain |= {f"{path}/{file.name}": file.read_bytes() for file in folder.iterdir()}
        return self.url + path

    def ranges(self, path: str) -> list[int]:
        """Where each GET of a path began."""
        return [request.range for request in self.requests if (request.method, request.path) == ("GET", path)]


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Serve until the block ends."""

    class Handler(_Handler):
        hub: HubServer

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    hub = Handler.hub = HubServer(f"http://127.0.0.1:{httpd.server_port}")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()


def cdn_path(content: bytes) -> str:
    """Where the hub sends those who want a large file."""
    return f"/cdn/{sha256(content)}"


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Tests look at `requests`."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self._start = int(found[1]) if found else 0
        self.hub.requests.append(Request(self.command, path, self._start, self.headers))
        if self.hub.statuses.get(path):
            self._status(self.hub.statuses[path].pop(0))
        elif path in self.hub.plain:
            self._send(path, self.hub.plain[path])
        elif path.startswith("/cdn/"):
            contents = (content for files in self.hub.repositories.values() for content in files.values())
            self._send(path, next(content for content in contents if cdn_path(content) == path))
        elif self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._status(401)
        elif listing := re.fullmatch(r"/api/models/(.+?)/revision/(.+)", path):
            self._list(listing[1], listing[2])
        elif file := re.fullmatch(r"/(.+?/.+?)/resolve/(.+?)/(.+)", path):
            self._resolve(path, *file.groups())
        else:
            self._status(404)

    def _list(self, repository: str, revision: str) -> None:
        files, commit = self.hub.repositories.get(repository), self.hub.commits.get(repository, COMMIT)
        if files is None or revision not in ("main", commit):
            return self._status(404)
        siblings = []
        for name, content in files.items():
            sibling = {"rfilename": name, "size": len(content), "blobId": git_id(content)}
            lfs = {"lfs": {"sha256": sha256(content), "size": len(content), "pointerSize": 134}}
            siblings.append(sibling | (lfs if name.endswith(LARGE) else {}))
        body = json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode()
        return self._send("", body, {"Content-Type": "application/json"})

    def _resolve(self, path: str, repository: str, revision: str, name: str) -> None:
        content = self.hub.repositories.get(repository, {}).get(name)
        commit = self.hub.commits.get(repository, COMMIT)
        if content is None or revision not in ("main", commit):
            return self._status(404)
        headers = {"X-Repo-Commit": commit}
        if not name.endswith(LARGE):
            return self._send(path, content, headers | {"ETag": f'"{git_id(content)}"'})
        linked = {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost") + cdn_path(content)
        return self._status(302, headers | linked | {"Location": elsewhere})

    def _status(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, path: str, content: bytes, headers: dict[str, str] | None = None) -> None:
        content = self.hub.lies.get(path, content)
        start = self._start if self.hub.knows_ranges else 0
        ranged = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self._status(206 if start else 200, {"Content-Length": str(len(content) - start)} | ranged | (headers or {}))
        if self.command == "HEAD":
            return
        body = content[start:]
        if self.hub.cuts.get(path):
            self.wfile.write(body[: self.hub.cuts[path].pop(0)])
            self.close_connection = True
        elif self.hub.holds.get(path):
            self.wfile.write(body[: self.hub.holds[path].pop(0)])
            self.wfile.flush()
            self.hub.holding.set()
            self.hub.released.wait()
            self.close_connection = True
        else:
            self.wfile.write(body)
