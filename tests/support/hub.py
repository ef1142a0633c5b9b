"""A server that speaks as much of the hub's protocol as reading headers takes, and counts what it sends."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One model, ``org/model``, whose files are those of a folder."""

    url: str
    folder: Path
    sent: int = 0  # bytes of bodies
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, file, range


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        match = re.match(r"^/org/model/resolve/[^/]+/(?P<name>[^?]+)", self.path)
        name = match["name"] if match else ""
        wanted = self.headers.get("Range")
        self.hub.requests.append((self.command, name, wanted))
        path = self.hub.folder / name
        if not match or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if match else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        if wanted and (span := re.match(r"^bytes=(\d+)-(\d+)$", wanted)):
            first, last = int(span[1]), min(int(span[2]), last)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if body:
            self.hub.sent += last - first + 1
            self.wfile.write(content[first : last + 1])

    def do_GET(self) -> None:
        self._answer(True)

    def do_HEAD(self) -> None:
        self._answer(False)


@contextmanager
def serve_hub(folder: Path) -> Iterator[Hub]:
    """The server, on a free port of 127.0.0.1 until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", folder)
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
