"""DCP's writer with what a big file system asks for: checksums while it writes, patience, and plain words."""

import errno
import io
import os
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, cast

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from src.checkpoint.folder import CheckpointFile
from src.errors import CheckpointError, DiskFaultError, DiskFullError
from src.storage.patience import Patience
from src.storage.space import room


class _SummedStream:
    """A file that is written from its start to its end, with size and checksum of all that went in."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes = self.crc32 = 0

    def write(self, content: bytes | memoryview) -> int:
        block = memoryview(content)
        self._file.write(block)
        self.crc32 = zlib.crc32(block, self.crc32)
        self.bytes += block.nbytes
        return block.nbytes

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        self._file.flush()  # who asks for it is about to sync
        return self._file.fileno()

    def close(self) -> None:
        """OSError where the disk has another length for it than was written."""
        if self._file.closed:
            return
        self._file.flush()
        there = os.fstat(self._file.fileno()).st_size
        self._file.close()
        if there != self.bytes:
            raise OSError(errno.EIO, f"{there:,} bytes are there where {self.bytes:,} were written", self._file.name)


class _SummedFiles(FileSystem):
    """`written`: what each file that was opened for writing has become, by its name."""

    def __init__(self) -> None:
        self.written: dict[str, CheckpointFile] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        assert mode == "wb", "a writer only writes"
        with Path(path).open("wb") as file:
            stream = _SummedStream(cast(BinaryIO, file))
            yield cast(io.IOBase, stream)
            stream.close()
        self.written[Path(path).name] = CheckpointFile(stream.bytes, f"{stream.crc32:08x}")

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class CheckpointWriter(FileSystemWriter):
    """Says of a full disk that it is full: torch's own words are of positions in an archive. What passes is waited
    out; the files of this rank are then written from their beginning.
    """

    def __init__(self, path: Path, needed: int, patience: Patience, **options: Any) -> None:
        """`needed`: bytes of this rank."""
        super().__init__(path, **options)
        self.fs = self._files = _SummedFiles()
        self._path, self._needed, self._patience = path, needed, patience

    @property
    def written(self) -> dict[str, CheckpointFile]:
        """Size and checksum of every file that this rank has written, as it went in: no byte is read again for it."""
        return self._files.written

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with room(self._path, self._needed):
            return self._patience(lambda: super(CheckpointWriter, self).write_data(plan, planner), self._path)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with room(self._path):
            self._patience(lambda: super(CheckpointWriter, self).finish(metadata, results), self._path)


def explained(error: CheckpointException, what: str) -> Exception:
    """The disk's failures in plain words (torch's writer turns a full disk into a RuntimeError), others as they are."""
    failures = {rank: failure for rank, (failure, _) in error.failures.items()}
    if full := [failure for failure in failures.values() if isinstance(failure, DiskFullError)]:
        return DiskFullError(dict.fromkeys(problem for each in full for problem in each.problems))
    if fault := [failure for failure in failures.values() if isinstance(failure, DiskFaultError)]:
        return DiskFaultError(dict.fromkeys(problem for each in fault for problem in each.problems))
    if all(isinstance(failure, (OSError, RuntimeError, UnpicklingError)) for failure in failures.values()):
        # torch's own words about a pickle advise to run it.
        foreign = "a tensor's place holds something else; nothing of it was run"
        said = {rank: foreign if isinstance(each, UnpicklingError) else each for rank, each in failures.items()}
        return CheckpointError([f"{what} by rank {rank}: {words}" for rank, words in said.items()])
    return RuntimeError(f"{what}: {error}")
