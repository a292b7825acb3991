"""`serve`: pages of a folder of runs on the loopback address of this machine, to read only, with a token."""

import contextlib
import hmac
import json
import secrets
import socket
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from src.entry import raise_again
from src.errors import FolderError, UserError
from src.runs.commands.serve.run_pages import RunPages, WebAnswer

ADDRESS = "127.0.0.1"
KEY = "token"
HEADERS = {
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class PageServer(ThreadingHTTPServer):
    """Answers GET and HEAD for those whose address or cookie has `token`; any other method is refused."""

    daemon_threads = True

    def __init__(self, root: Path, port: int) -> None:
        self.pages = RunPages(root)
        self.token = secrets.token_urlsafe(24)
        super().__init__((ADDRESS, port), PageRequest)

    @property
    def url(self) -> str:
        """With the token; a browser that has opened it needs no other."""
        return f"http://{ADDRESS}:{self.server_port}/?{urlencode({KEY: self.token})}"


class PageRequest(BaseHTTPRequestHandler):
    """One request."""

    server: PageServer
    server_version, sys_version = "runs", ""

    def do_GET(self) -> None:
        """A page, a redirection to the same address without the token, or why not."""
        asked = urlsplit(self.path)
        query = parse_qs(asked.query)
        # A page elsewhere whose name was made to lead here (DNS rebinding) asks for another host.
        if self.headers.get("Host", "").partition(":")[0] not in (ADDRESS, "localhost"):
            self._send(HTTPStatus.FORBIDDEN, _text("another host is asked for"))
        elif self._knows(query.pop(KEY, [""])[0]):
            cookie = f"{self._cookie}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
            address = asked._replace(scheme="", netloc="", query=urlencode(query, doseq=True)).geturl()
            # Two slashes in front would be another host's address.
            self._send(HTTPStatus.FOUND, _text(""), {"Set-Cookie": cookie, "Location": "/" + address.lstrip("/")})
        elif not self._knows(self._from_cookie()):
            self._send(HTTPStatus.FORBIDDEN, _text("open the address that `python -m src.runs serve` has printed"))
        else:
            try:
                self._send(HTTPStatus.OK, self.server.pages.answer(asked.path, query))
            except FolderError as error:
                self._send(HTTPStatus.NOT_FOUND, _text("\n".join(error.problems)))
            except (UserError, OSError) as error:  # a folder that went while it was read, or that cannot be
                self._send(HTTPStatus.INTERNAL_SERVER_ERROR, _text(str(error)))

    def do_HEAD(self) -> None:
        """As GET, without the body."""
        self.do_GET()

    @property
    def _cookie(self) -> str:
        """Its name: cookies do not heed ports, and several servers may be on one machine."""
        return f"runs_{self.server.server_port}"

    def _from_cookie(self) -> str:
        try:
            found = SimpleCookie(self.headers.get("Cookie", "")).get(self._cookie)
        except CookieError:
            return ""
        return found.value if found else ""

    def _knows(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self.server.token.encode())

    def _send(self, code: HTTPStatus, answer: WebAnswer, more: dict[str, str] | None = None) -> None:
        self.send_response(code)
        cache = "private, max-age=86400" if answer.kept else "no-store"
        told = {"Content-Type": answer.kind, "Content-Length": str(len(answer.body)), "Cache-Control": cache}
        for name, value in (HEADERS | told | (more or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, *_: Any) -> None:
        """Nothing: addresses may hold the token."""


def _text(words: str) -> WebAnswer:
    return WebAnswer(f"{words}\n".encode(), "text/plain; charset=utf-8")


def serve(root: Path, port: int, *, as_json: bool) -> int:
    """Until Ctrl-C. FolderError for a folder that is not there or a port that is taken."""
    raise_again()
    if not root.is_dir():
        raise FolderError(f"{root}: no such folder; pass --root, or set RUNS")
    try:
        server = PageServer(root, port)
    except (OSError, OverflowError) as error:
        raise FolderError(f"--port {port}: {error}; pass another, or 0 for any that is free") from error
    with server:
        if as_json:
            print(json.dumps({"url": server.url, "root": str(root)}), flush=True)
        else:
            print(server.url, flush=True)
            there = f"ssh -L {server.server_port}:{ADDRESS}:{server.server_port} {socket.gethostname()}"
            print(f"from another machine: {there}, then the same address; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0
