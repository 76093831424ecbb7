"""A hub on this machine: an HTTP server that speaks enough of the Hugging Face hub's protocol for its own client.

Serves folders `root/owner/name` as repositories of one commit each, with gating, tokens, byte ranges and connections
that break, and records every request, so that a test can prove what was fetched. No xet, no redirects to a CDN.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>.+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_LARGE_FILES = frozenset({".bin", ".safetensors"})  # whose digests the listing has


@dataclass(frozen=True, slots=True)
class HubRequest:
    """One request, as it arrived."""

    method: str
    path: str
    first_byte: int  # of a ranged request, else 0
    token: str  # without "Bearer"; empty when none was sent
    client_port: int  # of the connection; while it lasts it tells which process asks


class _Refusal(Exception):  # noqa: N818 - an answer rather than an error
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}


class LocalHub:
    """A running hub; a context manager. Change its sets while it runs to change what it does."""

    def __init__(self, root: Path, *, token: str = "", gated: Iterable[str] = (), private: Iterable[str] = ()) -> None:
        self.root = root
        self.token = token  # the one that opens gated and private repositories
        self.gated = set(gated)
        self.private = set(private)
        self.broken_after: dict[str, int] = {}  # file → bytes after which its next transfer breaks off, once
        self.failing_with = 0  # a status that answers everything
        self.requests: list[HubRequest] = []
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> LocalHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT must say."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def commit(self, repo_id: str) -> str:
        """Return the commit of a repository: it changes with any of its files."""
        digest = hashlib.sha1(usedforsecurity=False)
        for path in self._files(repo_id):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def fetched(self, repo_id: str) -> set[str]:
        """Return the files whose contents were asked for."""
        matches = [_FILE.fullmatch(unquote(request.path)) for request in self.requests if request.method == "GET"]
        return {match["file"] for match in matches if match and match["repo"] == repo_id}

    def describe(self, repo_id: str, revision: str, token: str) -> dict[str, Any]:
        """Return the listing of a repository. Gated ones are listed for anybody, as on the real hub."""
        self._check_exists(repo_id, revision, token)
        siblings = [_sibling(path) for path in self._files(repo_id)]
        return {
            "_id": repo_id,
            "id": repo_id,
            "sha": self.commit(repo_id),
            "private": repo_id in self.private,
            "gated": "manual" if repo_id in self.gated else False,
            "tags": [],
            "siblings": siblings,
        }

    def find(self, repo_id: str, revision: str, file: str, token: str) -> Path:
        """Return a file of a repository."""
        self._check_exists(repo_id, revision, token)
        if repo_id in self.gated and token != self.token:
            raise _Refusal(403 if token else 401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        path = next((path for path in self._files(repo_id) if path.name == file), None)
        if path is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        return path

    def _check_exists(self, repo_id: str, revision: str, token: str) -> None:
        if self.failing_with:
            raise _Refusal(self.failing_with, "", "Out of order")
        if token and token != self.token:
            raise _Refusal(401, "", "Invalid credentials in Authorization header")
        if not (self.root / repo_id).is_dir() or (repo_id in self.private and not token):
            raise _Refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        if revision not in ("main", self.commit(repo_id)):
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _files(self, repo_id: str) -> list[Path]:
        return sorted(path for path in (self.root / repo_id).iterdir() if path.is_file())


def _sibling(path: Path) -> dict[str, Any]:
    size_bytes = path.stat().st_size
    sibling: dict[str, Any] = {"rfilename": path.name, "size": size_bytes}
    if path.suffix in _LARGE_FILES:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        sibling["lfs"] = {"sha256": digest, "size": size_bytes, "pointerSize": 134}
    return sibling


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: LocalHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 10.0
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Silent: `hub.requests` has it all."""

    def _answer(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        hub.requests.append(HubRequest(self.command, path, self._first_byte(), token, self.client_address[1]))
        try:
            if match := _API.fullmatch(path):
                listing = hub.describe(match["repo"], unquote(match["revision"] or "main"), token)
                self._send(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())
            elif match := _FILE.fullmatch(unquote(path)):
                self._send_file(match["repo"], hub.find(match["repo"], match["revision"], match["file"], token))
            else:
                raise _Refusal(404, "", f"no such page: {path}")
        except _Refusal as refusal:
            self._send(refusal.status, refusal.headers, str(refusal).encode())

    def _first_byte(self) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(match[1]) if match else 0

    def _send_file(self, repo_id: str, path: Path) -> None:
        data, first = path.read_bytes(), self._first_byte()
        headers = {
            "X-Repo-Commit": self.server.hub.commit(repo_id),
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        breaks = self.server.hub.broken_after
        break_after = breaks.pop(path.name, None) if self.command == "GET" else None
        self._send(206 if first else 200, headers, data[first:], break_after)

    def _send(self, status: int, headers: dict[str, str], body: bytes, break_after: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:break_after])
        if break_after is not None:
            self.close_connection = True
