"""Files that are there whole or not at all, whenever the process or the machine dies."""

import os
import uuid
from contextlib import suppress
from pathlib import Path

from src.storage.space import room
from src.storage.usable import usable

TEMPORARY = ".tmp"  # how the names of files end that a kill has left half-written


def atomic_write(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write beside `path`, then rename over it; who reads sees the old content or the new, never a part.

    Text is UTF-8; bytes that were no UTF-8 and came as surrogates go out as they came. `durable`: on the disk on
    return, file and name, so that a power cut cannot take it back. OSError, of a full disk DiskFullError, of a file
    that cannot be replaced UnusableFileError; `path` is as it was then.
    """
    content = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    temporary = temporary_beside(path)
    try:
        with room(path, len(content)), usable(path, "written"):
            with temporary.open("wb") as file:
                file.write(content)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # of a folder that cannot be written to; the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def temporary_beside(path: Path) -> Path:
    """A hidden name in the same folder that no other writer of `path` has, on this machine or another."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
