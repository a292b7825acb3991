"""DCP's writer with what a big file system and a big world ask for: checksums while it writes, patience, plain words,
and a plan that is kept.
"""

import errno
import io
import os
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import add
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, cast

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from src.checkpoint.folder import CheckpointFile
from src.checkpoint.host_group import HostGroup
from src.checkpoint.state import Snapshot
from src.errors import CheckpointError, UserError
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


@dataclass(frozen=True)
class WrittenFiles:
    """What ranks have written, and what their file systems have cost them so far."""

    files: dict[str, CheckpointFile]
    faults: int
    waited_seconds: float  # of the one that waited longest

    def joined(self, other: "WrittenFiles") -> "WrittenFiles":
        waited = max(self.waited_seconds, other.waited_seconds)
        return WrittenFiles(self.files | other.files, self.faults + other.faults, waited)


@contextmanager
def in_words(what: str, rank: int) -> Iterator[None]:
    """The disk's failures in plain words (torch's writer turns a full disk into a RuntimeError), others as they are."""
    try:
        yield
    except UserError:  # of a full disk, say, which is an OSError too
        raise
    except UnpicklingError:  # torch's own words about a pickle advise to run it
        words = "a tensor's place holds something else; nothing of it was run"
        raise CheckpointError(f"{what} by rank {rank}: {words}") from None
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{what} by rank {rank}: {error}") from None


class SavePlans:
    """Who writes what, and where it came to lie: agreed on at the first save of a store, and kept. Every method is
    collective.

    For 405B on tensor 8 x shard 512, each of 4,096 ranks has 692 KB of plan, of which rank 0 makes 2.1 GB of metadata
    in minutes. Nothing of it changes from save to save, so that later ones agree on one number each way.
    """

    def __init__(self, team: HostGroup) -> None:
        self._team = team
        self._mine: SavePlan | None = None  # as this rank asked for it
        self._agreed: SavePlan | None = None  # without what another rank writes
        self._results: list[WriteResult] | None = None  # of this rank
        # On rank 0:
        self._metadata: Metadata | None = None
        self._all_results: list[list[WriteResult]] = []

    def agree(self, snapshot: Snapshot, writer: FileSystemWriter) -> SavePlan:
        """What this rank shall write."""
        mine = snapshot.create_local_plan()
        if self._team.any(lambda: mine != self._mine) or self._agreed is None:
            plans = self._team.joined(lambda: [mine], add)
            made: list[SavePlan] = []
            self._team.on_rank_zero(lambda: made.extend(self._plan(plans or [], snapshot, writer)))
            self._agreed = self._team.spread(made or None)
            self._mine, self._results = mine, None
        return self._agreed

    def _plan(self, plans: list[SavePlan], snapshot: Snapshot, writer: FileSystemWriter) -> list[SavePlan]:
        """Rank 0: of each, what no other one writes; and the metadata that tells of all."""
        made, self._metadata = snapshot.create_global_plan(plans)
        return writer.prepare_global_plan(made)

    def finish(self, results: list[WriteResult], writer: FileSystemWriter) -> None:
        """Write the metadata. `results`: of what this rank has written."""
        if self._team.any(lambda: results != self._results):
            self._all_results = self._team.joined(lambda: [results], add) or []
            self._results = results
        self._team.on_rank_zero(lambda: self._finish(writer))

    def _finish(self, writer: FileSystemWriter) -> None:
        assert self._metadata is not None, "the plan was made"
        writer.finish(self._metadata, self._all_results)
