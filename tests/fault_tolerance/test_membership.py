"""What a group learns of the lighthouse by its page of status."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from types import SimpleNamespace
from uuid import uuid4

from torchft.coordination import LighthouseClient, LighthouseServer

from src.distributed.process.rank_context import Replica
from src.fault_tolerance.membership import Membership
from src.fault_tolerance.synchronous_groups import _short


def member(address: str, *quorum: str, rank: int = 0) -> Membership:
    """One that has met these, without a server of its own."""
    found = Membership.__new__(Membership)
    found.replica = Replica(0, address)
    found.options = SimpleNamespace(min_groups=2, heartbeat_seconds=60.0)
    found.ranks = SimpleNamespace(rank=rank)
    found._quorum = (1, quorum)
    return found


def test_groups_that_live_outside_of_the_quorum() -> None:
    """As torchft's own lighthouse tells: the words of its page are read."""
    server = LighthouseServer(bind="[::]:0", min_replicas=1)
    mine, former, other = (f"{group:04d}:{uuid4()}" for group in (0, 0, 2))
    client = LighthouseClient(server.address(), timedelta(seconds=10))
    for name in (mine, former, other):
        client.heartbeat(name)
    assert member(server.address(), mine).outside() == {2}, "nor the former life of this group"
    assert member(server.address(), mine, other).outside() == set()
    assert member(server.address(), mine, rank=1).outside() == set(), "one rank asks for its group"
    server.shutdown()


class Page(BaseHTTPRequestHandler):
    """Of another program."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<h1>It works!</h1>")

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def another_program() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Page)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_what_is_waited_for_is_said() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert f"nothing answers at {nobody}" in member(nobody)._waits_for()
    with another_program() as address:
        assert f"what answers at {address} is no lighthouse" in member(address)._waits_for()
        assert member(address).outside() == set()
    server = LighthouseServer(bind="[::]:0", min_replicas=2)
    assert "waits for other groups: the lighthouse has no quorum yet" in member(server.address())._waits_for()
    server.shutdown()


def test_an_error_of_gloo_is_cut_behind_what_it_says() -> None:
    place = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] "
    error = RuntimeError(f"{place}Connection closed by peer [127.0.0.1]:36310\nException raised from wait at {place}")
    assert _short(error) == "RuntimeError: Connection closed by peer [127.0.0.1]:36310"
