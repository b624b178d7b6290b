"""A web server on loopback that serves bytes, with Range, and misbehaves as told. Stands in for the hub in tests."""

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Fault:
    """What to do with the next request of a path: answer `status`, or cut or spoil the body after `cut` bytes.

    With `stall` what follows the cut doesn't come either, but the connection stays.
    """

    status: int | None = None
    retry_after: str | None = None
    cut: int | None = None
    damage: bool = False
    stall: bool = False


@dataclass
class Request:
    path: str
    time: float
    range: str | None
    authorization: str | None


@dataclass
class Server:
    """`files`: path to bytes or to a JSON value. `faults`: per path, one a request, in order."""

    files: dict[str, Any] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    ranges: bool = True
    ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Server":
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner._answer(self)

            def do_HEAD(self) -> None:
                owner._describe(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    def _describe(self, handler: BaseHTTPRequestHandler) -> None:
        """What the hub says of a file before it is fetched."""
        path = unquote(urlsplit(handler.path).path)
        value = self.files.get(path)
        handler.send_response(200 if isinstance(value, bytes) else 404)
        if isinstance(value, bytes):
            handler.send_header("ETag", f'"{hashlib.sha256(value).hexdigest()}"')
            handler.send_header("X-Repo-Commit", path.split("/resolve/")[1].split("/")[0])
        else:
            handler.send_header("X-Error-Code", "EntryNotFound")
        handler.send_header("Content-Length", str(len(value)) if isinstance(value, bytes) else "0")
        handler.end_headers()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, query = unquote(urlsplit(handler.path).path), urlsplit(handler.path).query
        asked_range = handler.headers.get("Range")
        self.requests.append(Request(path, time.monotonic(), asked_range, handler.headers.get("Authorization")))
        fault = self.faults[path].pop(0) if self.faults.get(path) else Fault()
        if fault.status is not None:
            handler.send_response(fault.status)
            if fault.retry_after is not None:
                handler.send_header("Retry-After", fault.retry_after)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if path not in self.files:
            handler.send_response(404)
            if "/tree/" in path:
                handler.send_header("X-Error-Code", "EntryNotFound")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        value = self.files[path]
        if "recursive=true" in query.lower():
            inside = [found for name, found in self.files.items() if f"{name}/".startswith(f"{path}/")]
            value = [entry for entries in inside if isinstance(entries, list) for entry in entries]
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        start = 0
        if asked_range and self.ranges:
            start = int(asked_range.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{len(data)}")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            handler.send_response(200)
        body = data[start:]
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header(
            "Content-Type", "application/octet-stream" if isinstance(value, bytes) else "application/json"
        )
        handler.end_headers()
        if fault.damage:
            body = bytes([body[0] ^ 1]) + body[1:]
        handler.wfile.write(body[: fault.cut])
        if fault.stall:
            handler.wfile.flush()
            self.ended.wait()
        if fault.cut is not None:
            handler.close_connection = True


def hub_files(repo: str, revision: str, files: dict[str, bytes], configs: list[dict[str, Any]]) -> dict[str, Any]:
    """What a hub serves for a data set: its card, the listing of every folder, and the files, at one commit."""
    card = f"---\nconfigs: {json.dumps(configs)}\n---\n".encode()
    served: dict[str, Any] = {f"/datasets/{repo}/resolve/{revision}/README.md": card}
    info = {"id": repo, "sha": revision, "cardData": {"configs": configs}, "siblings": [], "tags": []}
    for name in (revision, "main"):
        served[f"/api/datasets/{repo}/revision/{name}"] = info
    folders: dict[str, list[dict[str, Any]]] = {}
    for path, data in files.items():
        entry = {
            "type": "file",
            "path": path,
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
            "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134},
        }
        folders.setdefault(path.rpartition("/")[0], []).append(entry)
        served[f"/datasets/{repo}/resolve/{revision}/{path}"] = data
    for folder in [*folders]:
        while folder:
            parent = folder.rpartition("/")[0]
            entry = {"type": "directory", "path": folder, "oid": hashlib.sha1(folder.encode()).hexdigest()}
            if entry not in folders.setdefault(parent, []):
                folders[parent].append(entry)
            folder = parent
    tree = f"/api/datasets/{repo}/tree/{revision}"
    for folder, entries in folders.items():
        served[f"{tree}/{folder}".rstrip("/")] = entries
    served.setdefault(tree, [])
    return served
