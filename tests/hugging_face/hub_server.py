"""A hub on this machine: what huggingface_hub asks for a repository's files, answered from a folder."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Hub:
    """`revisions`: by name of a branch and by commit, the folder with the files of `repository`."""

    repository: str
    revisions: dict[str, tuple[str, Path]]  # name -> commit, folder
    token: str | None = None
    asked: list[str] = field(default_factory=list)  # method, path and range of every question
    broken_after: int | None = None  # bytes of each answer, then the connection is gone
    url: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """While this is open, `hub.url` answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _answer(self, hub)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _answer(handler: BaseHTTPRequestHandler, hub: Hub) -> None:
    path = handler.path.partition("?")[0]
    hub.asked.append(f"{handler.command} {path} {handler.headers.get('Range') or ''}".strip())
    if hub.token is not None and handler.headers.get("Authorization") != f"Bearer {hub.token}":
        return _say(handler, 401, b"", {"X-Error-Code": "RepoNotFound"})
    for name, (commit, folder) in hub.revisions.items():
        if path == f"/api/models/{hub.repository}/revision/{name}":
            return _say(handler, 200, json.dumps(_facts(hub, commit, folder)).encode(), {})
        if path == f"/api/models/{hub.repository}/tree/{name}":
            return _say(handler, 200, json.dumps(_tree(folder)).encode(), {})
        if path.startswith(f"/{hub.repository}/resolve/{name}/"):
            return _file(handler, hub, commit, folder / path.rpartition("/")[2])
    known = path.startswith((f"/api/models/{hub.repository}/", f"/{hub.repository}/"))
    return _say(handler, 404, b"", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})


def _facts(hub: Hub, commit: str, folder: Path) -> dict[str, Any]:
    names = sorted(path.name for path in folder.iterdir())
    return {"id": hub.repository, "sha": commit, "private": False, "tags": [], "downloads": 0} | {
        "siblings": [{"rfilename": name} for name in names]
    }


def _tree(folder: Path) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _hash(path)}
        for path in sorted(folder.iterdir())
    ]


def _hash(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


def _file(handler: BaseHTTPRequestHandler, hub: Hub, commit: str, path: Path) -> None:
    if not path.is_file():
        return _say(handler, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
    content = path.read_bytes()
    headers = {"X-Repo-Commit": commit, "ETag": f'"{_hash(path)}"', "Accept-Ranges": "bytes"}
    asked = handler.headers.get("Range")
    if asked is None:
        return _say(handler, 200, content, headers, hub.broken_after)
    first = int(asked.removeprefix("bytes=").partition("-")[0])
    headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
    return _say(handler, 206, content[first:], headers)


def _say(
    handler: BaseHTTPRequestHandler, code: int, content: bytes, headers: dict[str, str], most: int | None = None
) -> None:
    handler.send_response(code)
    for key, value in headers.items():
        handler.send_header(key, value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    if handler.command == "HEAD":
        return
    handler.wfile.write(content[:most])
    if most is not None and most < len(content):
        handler.close_connection = True
