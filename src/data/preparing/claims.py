"""Which preparer is at work on a piece: a file beside its record, fresh for as long as its writer lives.

A claim saves work and guards nothing: two preparers of one piece write the same bytes, each under a name of its own
until it is whole.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0  # of a claim by another host: its clock and its file system may be late


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether the piece of this claim is ours now. False while another preparer lives on it."""
    if not _taken(path):
        yield False
        return
    done = threading.Event()
    beat = threading.Thread(target=_keep_fresh, args=(path, done), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        done.set()
        beat.join()
        path.unlink(missing_ok=True)


def _taken(path: Path) -> bool:
    """Made, or taken over from a preparer that is gone."""
    for _ in range(2):
        with suppress(FileExistsError):
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            with os.fdopen(descriptor, "w") as file:
                json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
            return True
        if not _orphaned(path):
            return False
        path.unlink(missing_ok=True)
    return False


def _orphaned(path: Path) -> bool:
    try:
        age = time.time() - path.stat().st_mtime
        owner = json.loads(path.read_text())
    except FileNotFoundError:
        return True
    except ValueError:  # it is being written, or was torn
        return age > STALE_SECONDS
    if owner["host"] != socket.gethostname():
        return age > STALE_SECONDS
    return not _lives(int(owner["pid"]))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _keep_fresh(path: Path, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):  # taken over, or a file system that is away for a moment
            os.utime(path)
