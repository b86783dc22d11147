"""Serves the page, packages and transformers.js on this machine alone: python serve.py PACKAGE... [--port 8000]

A static server, but for two headers: they isolate the page, which browsers ask for before they let its parts share
memory, and WebAssembly have threads.
"""

from __future__ import annotations

import argparse
import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
PAGE_FILES = ("index.html", "style.css", "page.js", "worker.js", "transformers.js")
CONTENT_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
ISOLATION = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


class Handler(SimpleHTTPRequestHandler):
    """Files of the page, of `/packages/NAME/` and of `/modules/`; nothing else."""

    def __init__(self, *args: object, packages: Mapping[str, Path], modules: Path, **others: object) -> None:
        self.packages, self.modules = packages, modules
        super().__init__(*args, **others)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        if urlsplit(self.path).path == "/packages.json":
            self._send_packages()
        else:
            super().do_GET()

    def translate_path(self, path: str) -> str:
        """The file of a URL; a name that no file has where there is none for it."""
        parts = [part for part in posixpath.normpath(unquote(urlsplit(path).path)).split("/") if part not in ("", "..")]
        if not parts:
            return str(HERE / "index.html")
        if parts[0] == "packages" and len(parts) > 2 and parts[1] in self.packages:
            return str(self.packages[parts[1]].joinpath(*parts[2:]))
        if parts[0] == "modules":
            return str(self.modules.joinpath(*parts[1:]))
        return str(HERE / parts[0]) if len(parts) == 1 and parts[0] in PAGE_FILES else "/dev/null/none"

    def list_directory(self, path: object) -> None:
        self.send_error(404)

    def end_headers(self) -> None:
        for name, value in {**ISOLATION, "Cache-Control": "no-cache"}.items():
            self.send_header(name, value)
        super().end_headers()

    def guess_type(self, path: str | os.PathLike[str]) -> str:
        return CONTENT_TYPES.get(Path(path).suffix) or super().guess_type(path)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet: a page asks for many files."""

    def _send_packages(self) -> None:
        sizes = {
            name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            for name, folder in self.packages.items()
        }
        body = json.dumps([{"name": name, "bytes": size} for name, size in sizes.items()]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, nargs="+", metavar="PACKAGE", help="a folder that export.convert wrote")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free; default: 8000")
    parser.add_argument(
        "--modules", type=Path, default=HERE / "node_modules", metavar="DIR", help="where npm installed transformers.js"
    )
    options = parser.parse_args(argv)
    packages = {folder.resolve().name: folder.resolve() for folder in options.packages}
    missing = [str(folder) for folder in packages.values() if not (folder / "manifest.json").is_file()]
    if missing:
        parser.error(f"{', '.join(missing)}: no manifest.json, so no package; python -m export.convert writes one")
    if not (options.modules / "@huggingface/transformers").is_dir():
        parser.error(f"{options.modules}: no @huggingface/transformers; run npm ci --ignore-scripts in {HERE}")
    handler = partial(Handler, packages=packages, modules=options.modules.resolve())
    with ThreadingHTTPServer(("127.0.0.1", options.port), handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
