"""What is known of the pieces of a source, as one table of numbers.

As JSON, the 250,000 pieces of 15 trillion tokens take 92 MB, 3.1 s and 400 MB of memory on each rank; as a file of
numbers 24 MB, which are mapped, checked, added up and let go in some 0.05 s.
"""

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from src.data.fingerprint import fingerprint
from src.errors import DataError
from src.storage.atomic_write import atomic_write

FILE = "pieces.npy"  # beside index.json
SPLITS = ("train", "validation")
COLUMNS = ("file_bytes", "tokens", "documents", "text_bytes", "empty", "crc32")


@dataclass(frozen=True)
class Shard:
    """The tokens that a piece gives to a split. Columns of the table, but for the name."""

    file: str
    file_bytes: int
    tokens: int
    documents: int
    text_bytes: int
    empty: int  # documents without text: counted, not written
    crc32: int


def shard_name(number: int, split: str) -> str:
    return f"{number:05d}.{split}.bin"


class PieceTable:
    """Numbers by (split, column, piece), int64."""

    def __init__(self, numbers: NDArray[np.int64]) -> None:
        self._numbers = numbers

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Shard]]) -> Self:
        """`records`: the shards of each piece, by split."""
        rows = [[[getattr(record[split], each) for record in records] for each in COLUMNS] for split in SPLITS]
        return cls(np.array(rows, np.int64).reshape(len(SPLITS), len(COLUMNS), len(records)))

    @classmethod
    def read(cls, folder: Path, pieces: int, checksum: int) -> Self:
        """Mapped. DataError where it is not the one that was written."""
        path = folder / FILE
        try:
            numbers = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: missing or cut off") from error
        if numbers.shape != (len(SPLITS), len(COLUMNS), pieces) or numbers.dtype != np.dtype("<i8"):
            raise DataError(f"{path}: not the table of {pieces} pieces")
        if zlib.crc32(memoryview(numbers)) != checksum:
            raise DataError(f"{path}: corrupted (its checksum is wrong)")
        return cls(numbers)

    def write(self, folder: Path) -> int:
        """Durably; returns the checksum that `read` asks for."""
        content = io.BytesIO()
        numbers: NDArray[np.int64] = np.ascontiguousarray(self._numbers, "<i8")
        np.save(content, numbers, allow_pickle=False)
        atomic_write(folder / FILE, content.getvalue(), durable=True)
        return zlib.crc32(numbers.tobytes())

    def __len__(self) -> int:
        return int(self._numbers.shape[-1])

    def column(self, split: str, name: str) -> NDArray[np.int64]:
        column: NDArray[np.int64] = self._numbers[SPLITS.index(split), COLUMNS.index(name)]
        return column

    def shards(self, split: str) -> list[Shard]:
        """Those of all pieces: 0.5 s and 100 MB for 250,000 of them."""
        rows = self._numbers[SPLITS.index(split)].T.tolist()
        return [Shard(shard_name(number, split), *row) for number, row in enumerate(rows)]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the tokens."""
        columns = [(self.column(split, "tokens").tolist(), self.column(split, "crc32").tolist()) for split in SPLITS]
        return fingerprint([list(zip(*each, strict=True)) for each in columns])
