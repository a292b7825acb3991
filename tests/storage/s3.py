"""A real S3 over HTTP on 127.0.0.1: moto's, in a thread of the test's process, with faults on request."""

import os
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from fsspec import get_filesystem_class

BUSY = b"<?xml version='1.0'?><Error><Code>ServiceUnavailable</Code><Message>busy</Message></Error>"
Answer = Callable[..., Iterable[bytes]]


class S3Server:
    """`busy` and `cut`: how many of the next requests that match `faulty` are answered 503, or end in the middle of
    what they send.
    """

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *_args: Any, **_more: Any) -> None:
                """No line for each request."""

        self.busy, self.cut, self.faulty = 0, 0, "PUT .*"
        self.requests: list[str] = []
        self._app: Answer = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to know. One try a request: those of ours are what the tests are about."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def bucket(self, name: str) -> str:
        """The URL of a new bucket."""
        self.busy, self.cut, self.faulty = 0, 0, "PUT .*"
        files("s3").mkdir(name)
        return f"s3://{name}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        asked = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        self.requests.append(asked)
        if re.fullmatch(self.faulty, asked):
            if self.busy > 0:
                self.busy -= 1
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response("503 Service Unavailable", [("Content-Type", "application/xml")])
                return [BUSY]
            if self.cut > 0:
                self.cut -= 1
                environ["wsgi.input"].read(1)
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                raise ConnectionResetError
        return self._app(environ, start_response)


def files(scheme: str) -> Any:
    """A file system, for what a test wants to do or see there by itself."""
    return get_filesystem_class(scheme)(use_listings_cache=False)


@contextmanager
def served() -> Iterator[S3Server]:
    """The server, and an environment in which s3:// is it."""
    server = S3Server()
    try:
        with known(server.environment):
            yield server
    finally:
        server.close()


@contextmanager
def known(environment: dict[str, str]) -> Iterator[None]:
    """This environment for new clients, which try once by themselves: those that are there know another server."""
    kind = get_filesystem_class("s3")
    with patch.dict(os.environ, environment), patch.object(kind, "retries", 1):
        kind.clear_instance_cache()
        yield
    kind.clear_instance_cache()
