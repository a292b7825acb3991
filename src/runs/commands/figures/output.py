"""Files that these commands write."""

from pathlib import Path

from src.errors import FolderError
from src.storage.atomic_write import atomic_write


def write(out: Path, content: str | bytes) -> None:
    """FolderError where it cannot be written."""
    try:
        atomic_write(out, content)
    except OSError as error:
        why = error.strerror or str(error)
        raise FolderError(f"out={out}: cannot be written ({why}); name a file in a folder that is there") from error
