"""A stand-in for the Hub's HTTP interface on loopback: repositories to load, uploads to receive, faults on request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

API = "/api/(?:datasets|models)"
LARGE = (".arrow", ".safetensors")
"""What is uploaded beside the commit"""


@dataclass
class Hub:
    """What the stand-in holds and what was asked of it."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """repository -> path -> content"""
    shas: dict[str, str] = field(default_factory=dict)
    """repository -> its newest commit"""
    faults: dict[str, list[int]] = field(default_factory=dict)
    """part of a path -> statuses of the next answers to it"""
    gated: set[str] = field(default_factory=set)
    private: dict[str, bool] = field(default_factory=dict)
    """repositories that were created"""
    tokens: set[str | None] = field(default_factory=set)
    """that came with writing requests"""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """large files by sha256"""
    requests: Counter[str] = field(default_factory=Counter)
    endpoint: str = ""

    def add(self, repository: str, files: dict[str, bytes]) -> str:
        """A dataset of one commit; returns its hash."""
        self.files[repository] = files
        self.shas[repository] = hashlib.sha1(repository.encode()).hexdigest()
        return self.shas[repository]


@contextmanager
def standin() -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests[f"{method} {path}"] += 1
        for part, statuses in self.hub.faults.items():
            if part in path and statuses:
                return self._send(statuses.pop(0), {"error": "fault"}, {"Retry-After": "0"})
        if method in ("POST", "PUT"):
            return self._write(method, path, body)
        if match := re.fullmatch(rf"{API}/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._info(match[1])
        if match := re.fullmatch(rf"{API}/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
            return self._tree(match[1], match[3])
        if match := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(method, match[1], match[3])
        return self._send(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})

    # -- loading -----------------------------------------------------------------------------------------------------

    def _known(self, repository: str) -> bool:
        if repository in self.hub.gated:
            self._send(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        elif repository not in self.hub.files:
            self._send(404, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"})
        else:
            return True
        return False

    def _info(self, repository: str) -> None:
        if self._known(repository):
            siblings = [{"rfilename": path} for path in self.hub.files[repository]]
            sha, private = self.hub.shas[repository], self.hub.private.get(repository, False)
            self._send(200, {"id": repository, "sha": sha, "siblings": siblings, "private": private, "tags": []})

    def _tree(self, repository: str, folder: str) -> None:
        if not self._known(repository):
            return
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, content in self.hub.files[repository].items():
            if path.startswith(prefix):
                oid = hashlib.sha1(content).hexdigest()
                entries[path] = {"type": "file", "path": path, "size": len(content), "oid": oid}
                for end in re.finditer("/", path[len(prefix) :]):
                    parent = path[: len(prefix) + end.start()]
                    entries.setdefault(parent, {"type": "directory", "path": parent, "oid": oid, "size": 0})
        if folder and not entries:
            return self._send(404, {"error": "no such entry"}, {"X-Error-Code": "EntryNotFound"})
        recursive = "recursive=true" in self.path.lower()
        shown = [e for e in entries.values() if recursive or "/" not in e["path"][len(prefix) :]]
        return self._send(200, shown)

    def _file(self, method: str, repository: str, path: str) -> None:
        if not self._known(repository):
            return
        content = self.hub.files[repository].get(path)
        if content is None:
            return self._send(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.hub.shas[repository]}
        return self._send(200, content, headers)

    # -- uploading ---------------------------------------------------------------------------------------------------

    def _write(self, method: str, path: str, body: bytes) -> None:
        if match := re.fullmatch(rf"{API}/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else []
            content = self.hub.files.get(match[1], {})
            return self._send(200, [{"type": "file", "path": p, "size": len(content[p]), "oid": "0"}
                                    for p in wanted if p in content])  # fmt: skip
        if path.startswith("/blob/"):
            self.hub.blobs[path.removeprefix("/blob/")] = body
            return self._send(200, {})
        self.hub.tokens.add(self.headers.get("Authorization"))
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
            kind = "datasets/" if wanted.get("type") == "dataset" else ""
            answer = {"url": f"{self.hub.endpoint}/{kind}{name}", "id": name, "name": name}
            if name in self.hub.files:  # as the Hub answers: what exists stays as it is
                return self._send(409, answer | {"error": "You already created this repo"})
            self.hub.private[name] = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.add(name, {})
            return self._send(200, answer)
        if match := re.fullmatch(rf"{API}/([^/]+/[^/]+)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                      "shouldIgnore": False} for f in files]  # fmt: skip
            return self._send(200, {"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"],
                 "actions": {"upload": {"href": f"{self.hub.endpoint}/blob/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]  # fmt: skip
            return self._send(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(rf"{API}/([^/]+/[^/]+)/commit/(.+)", path):
            return self._commit(match[1], body)
        return self._send(404, {"error": f"{method} {path}"})

    def _commit(self, repository: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[repository][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[repository][value["path"]] = self.hub.blobs[value["oid"]]
        url = f"{self.hub.endpoint}/datasets/{repository}/commit/{self.hub.shas[repository]}"
        self._send(200, {"success": True, "commitOid": self.hub.shas[repository], "commitUrl": url, "hookOutput": ""})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
