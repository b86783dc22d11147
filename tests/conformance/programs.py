"""Clients that are programs of their own: transformers.js in Node and in Chromium, and what is compiled."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

REQUIRE_CLIENTS = "GPT2_EDGE_REQUIRE_CLIENTS"

JAVASCRIPT = Path(__file__).parent / "javascript"
MODULES = JAVASCRIPT / "node_modules"
BROWSER_EXAMPLE = Path(__file__).parents[2] / "examples" / "browser"

LONGEST_S = 300
"""How long a client may take before it counts as hanging."""

Ids = Sequence[Sequence[int]]


class ClientError(Exception):
    """A client ended with an error; the message is what it wrote."""


def require(*names: str) -> None:
    """Skip the test where programs, or the modules from npm, are missing; fail it where clients must be there."""
    missing = [name for name in names if shutil.which(name) is None]
    if "node" in names and not MODULES.is_dir():
        missing.append("modules from npm")
    if missing:
        reason = f"{', '.join(missing)}: not installed; run scripts/test as root"
        pytest.fail(reason) if os.environ.get(REQUIRE_CLIENTS) == "1" else pytest.skip(reason)


def run(command: Sequence[str | Path], text: str = "", environment: Mapping[str, str] | None = None) -> str:
    """What a program writes to stdout.

    Raises:
        ClientError: it ended with another status than 0.
    """
    done = subprocess.run(
        list(map(str, command)),
        input=text,
        capture_output=True,
        encoding="utf-8",
        timeout=LONGEST_S,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    if done.returncode:
        raise ClientError(f"status {done.returncode}: {done.stderr[-4000:]}")
    return done.stdout


def jobs(
    package: Path,
    tasks: Sequence[str],
    prompts: Sequence[NDArray[np.int64]],
    new_tokens: int,
    texts: Sequence[str] = (),
) -> dict[str, Any]:
    """A request as javascript/jobs.mjs takes it."""
    ids = [prompt.tolist() for prompt in prompts]
    return {"package": package.name, "tasks": tasks, "prompts": ids, "texts": texts, "newTokens": new_tokens}


def in_node(
    package: Path,
    tasks: Sequence[str],
    prompts: Sequence[NDArray[np.int64]],
    new_tokens: int,
    *,
    texts: Sequence[str] = (),
    before: Sequence[str] = (),
) -> dict[str, Any]:
    """What transformers.js answers in Node, by task; `before` are words in front of the command.

    Raises:
        ClientError: it did not load the package, or did not run it.
    """
    request = {"folder": f"{package.parent}/", **jobs(package, tasks, prompts, new_tokens, texts)}
    answer: dict[str, Any] = json.loads(run([*before, "node", JAVASCRIPT / "node.mjs"], json.dumps(request)))
    return answer


def in_chromium(packages: Sequence[Path], steps: Mapping[str, Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """What the page of examples/browser shows and transformers.js answers there; see javascript/browser.mjs."""
    with served(packages) as url:
        request = {"executable": shutil.which("chromium"), "url": url, "steps": steps, **more}
        answer: dict[str, Any] = json.loads(run(["node", JAVASCRIPT / "browser.mjs"], json.dumps(request)))
    return answer


@contextmanager
def served(packages: Sequence[Path]) -> Iterator[str]:
    """The example's server on a port that was free; its address."""
    command = [sys.executable, BROWSER_EXAMPLE / "serve.py", *packages, "--port", "0", "--modules", MODULES]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def as_logits(encoded: str, tokens: int) -> NDArray[np.float32]:
    """[T, V] of what a client sent in base64."""
    return np.frombuffer(base64.b64decode(encoded), np.float32).reshape(tokens, -1)


def npm_version(module: str) -> str:
    """Of an installed module."""
    version: str = json.loads((MODULES / module / "package.json").read_text(encoding="utf-8"))["version"]
    return version
