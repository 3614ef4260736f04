"""A small hub on this machine: the part of the Hugging Face hub's HTTP protocol that a download uses.

https://huggingface.co/docs/hub/api and huggingface_hub's own client define it: /api/models/NAME[/revision/REVISION] lists the
files; HEAD of /NAME/resolve/REVISION/FILE tells commit, etag and size; GET sends weights to another host, which takes ranges.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_valid"


@dataclass
class Repo:
    """A repository: for each revision its files. `gated` and `private` need TOKEN. extra: fields of its /api/models answer."""

    files: Mapping[str, bytes]
    revisions: dict[str, Mapping[str, bytes]] = field(default_factory=dict)  # besides main
    gated: bool = False
    private: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[str, Mapping[str, bytes]] | None:
        """Commit and files of a branch, tag or commit."""
        for name, files in {"main": self.files, **self.revisions}.items():
            commit = hashlib.sha1(b"".join(k.encode() + v for k, v in sorted(files.items()))).hexdigest()
            if revision in (name, commit):
                return commit, files
        return None


@dataclass
class Request:
    """A request that the hub answered. sent: bytes of content."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    sent: int = 0


@dataclass
class Hub:
    """The repositories, how the hub behaves, and what it was asked."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    url: str = ""
    status: int | None = None  # answers everything so
    cut_after: int | None = None  # closes connections after so many bytes of a weight file
    stall_after: int | None = None  # sends so many bytes of a weight file, then nothing, until `goes_on` is set
    goes_on: threading.Event = field(default_factory=threading.Event)
    bytes_a_second: float | None = None  # of weight files
    takes_ranges: bool = True
    has_xet: bool = False  # says of weights that Xet stores them, which this hub does not

    def sent(self, end: str = "") -> int:
        """Bytes of the contents of files whose paths end so."""
        return sum(request.sent for request in self.requests if request.path.endswith(end) and "/api/" not in request.path)

    def asked(self, method: str, end: str = "") -> list[Request]:
        return [request for request in self.requests if request.method == method and request.path.endswith(end)]


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".gguf", ".model"))


def etag_of(name: str, content: bytes) -> str:
    if is_lfs(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Is quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        self.request_ = Request(self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        if path != "/api/agent-harnesses":  # the library asks that once a day, to name itself
            hub.requests.append(self.request_)
        if hub.status is not None:
            return self._refuse(hub.status)
        if path.startswith("/cdn/"):  # what a signed address gives, to whoever has it
            _, _, etag, name = path.split("/", 3)
            return self._weights(etag, name)
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        api = match is not None
        match = match or re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            return self._refuse(404)
        authorized = self.request_.authorization
        if authorized not in (None, f"Bearer {TOKEN}"):
            return self._refuse(401, message="Invalid credentials in Authorization header")
        repo = hub.repos.get(match[1])
        if repo is None or (repo.private and authorized is None):
            if authorized is None:  # it does not tell strangers what there is
                return self._refuse(401, message="Invalid username or password.")
            return self._refuse(404, "RepoNotFound")
        found = repo.at(match[2] or "main")
        if found is None:
            return self._refuse(404, "RevisionNotFound")
        commit, files = found
        if api:
            return self._list(match[1], repo, commit, files)
        if repo.gated and authorized is None:
            return self._refuse(401, "GatedRepo")
        if match[3] not in files:
            return self._refuse(404, "EntryNotFound")
        return self._file(commit, match[3], files[match[3]])

    def _list(self, name: str, repo: Repo, commit: str, files: Mapping[str, bytes]) -> None:
        siblings = []
        for file, content in files.items():
            lfs = {"sha256": etag_of(file, content), "size": len(content), "pointerSize": 134}
            blob = {"rfilename": file, "size": len(content), "blobId": etag_of(file, content) if not is_lfs(file) else "0" * 40}
            siblings.append(blob | ({"lfs": lfs} if is_lfs(file) else {}))
        body = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "gated": repo.gated and "manual"} | repo.extra
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, commit: str, name: str, content: bytes) -> None:
        etag = etag_of(name, content)
        told = {"X-Repo-Commit": commit}
        if is_lfs(name):
            other_host = f"http://localhost:{self.server.server_port}/cdn/{etag}/{name}"
            if self.server.hub.has_xet:
                told |= {"X-Xet-Hash": etag, "X-Xet-Refresh-Route": f"{self.server.hub.url}/api/xet"}
            told |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content)), "Location": other_host}
            return self._send(302, b"", told)
        return self._send(200, content, told | {"ETag": f'"{etag}"'})

    def _weights(self, etag: str, name: str) -> None:
        hub = self.server.hub
        contents = (
            files[name] for repo in hub.repos.values() for files in (repo.files, *repo.revisions.values()) if name in files
        )
        content = next(content for content in contents if etag_of(name, content) == etag)
        whole, status, told = len(content), 200, {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if self.request_.range is not None and hub.takes_ranges:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.request_.range).groups()  # type: ignore[union-attr]
            stop = min(whole, int(last) + 1 if last else whole)
            told["Content-Range"] = f"bytes {first}-{stop - 1}/{whole}"
            content, status = content[int(first) : stop], 206
        self._send(status, content, told, hub.cut_after, hub.bytes_a_second, hub.stall_after)

    def _refuse(self, status: int, code: str | None = None, message: str | None = None) -> None:
        told = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, b"{}", {name: value for name, value in told.items() if value is not None})

    def _send(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str],
        most: int | None = None,
        pace: float | None = None,
        stall: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        step = 1 << 20 if pace is None and stall is None else 10_000
        body = body[:most]
        with suppress(OSError):  # the client has gone
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                self.request_.sent += len(body[start : start + step])
                if pace is not None:
                    time.sleep(step / pace)
                if stall is not None and self.request_.sent >= stall:
                    self.server.hub.goes_on.wait(60)
        if most is not None:
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that were killed."""


@contextmanager
def running_hub(repos: Mapping[str, Repo]) -> Iterator[Hub]:
    """A hub on a free port."""
    hub, server = Hub(dict(repos)), _Server(("127.0.0.1", 0), Handler)
    server.hub = hub
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.goes_on.set()
        server.shutdown()
        server.server_close()
