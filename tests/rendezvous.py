"""Where ranks that a test starts meet."""

import socket

from src.distributed.process.rank_context import host_store


def launcher_store() -> tuple[object, int]:
    """A store of this process on a free port, as a launcher has one, and the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return host_store(listener), port
