"""A full disk, called that: whatever a library makes of it, who asked for the bytes says which and how many."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.errors import DiskFullError

# No room on the disk, none in this user's share of it, or none for a file of this size.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def disk_full(error: BaseException, path: Path, needed: int | None = None) -> DiskFullError | None:
    """What to raise in the place of `error` if a full disk is behind it, however deep; None for any other error.

    `path`: what was being written, where the error itself does not say; `needed`: bytes.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DiskFullError):
            return cause
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            return DiskFullError.at(Path(cause.filename or path), cause.errno, _free(path), needed)
        cause = cause.__cause__ or cause.__context__
    return None


def no_room(path: Path) -> DiskFullError:
    """Of a disk that somebody else found full."""
    return DiskFullError.at(path, errno.ENOSPC, _free(path), None)


@contextmanager
def room(path: Path, needed: int | None = None) -> Iterator[None]:
    """Raises DiskFullError for a disk that is full while `path` is written; `needed`: bytes."""
    try:
        yield
    except Exception as error:
        full = disk_full(error, path, needed)
        if full is None or full is error:
            raise
        raise full from error


def _free(path: Path) -> int | None:
    """Bytes that this user may still write where `path` is, or was to be."""
    for place in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


def write_all(descriptor: int, content: bytes) -> None:
    """All of it, or OSError: where room ends in the middle, a single write only says how much it took."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
