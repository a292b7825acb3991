"""A file that is there and cannot be used, called that: rights, a read-only disk, or a folder of its name."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from src.errors import UnusableFileError

# What stays as it is until a person acts. A broken or stale disk may be back a moment later, and keeps its own error.
_FOR_A_PERSON = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST})


@contextmanager
def usable(path: Path, verb: Literal["read", "written"]) -> Iterator[None]:
    """Raises UnusableFileError while `path` is opened or replaced; it is an OSError with the number of its cause."""
    try:
        yield
    except OSError as error:
        if isinstance(error, UnusableFileError) or error.errno not in _FOR_A_PERSON:
            raise
        told = f"{path}: cannot be {verb} ({error.strerror}); it must be a file that this user may read and write"
        found = UnusableFileError(told)
        found.errno, found.strerror, found.filename = error.errno, error.strerror, str(path)
        raise found from error
