"""Token shards: one file of little-endian ids for each piece and split, and the index that vouches for all of them.

A folder counts once index.json is renamed in; before that, each finished piece has a record of its own, so that a
killed preparation goes on where it stopped and several preparers may work on one folder. index.json vouches for
pieces.npy, which has the numbers of all pieces; an index of an older version has them in itself.
"""

import os
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from src.data.files import BadRow, described
from src.data.fingerprint import fingerprint, is_settled, read_memory, remember, stamp, write_json
from src.data.mapped.open_maps import OpenMaps
from src.data.mapped.piece_table import SPLITS, PieceTable, Shard, shard_name
from src.data.sources import PLACES_KEPT, SkippedRows
from src.data.tokenizer_formats.hub_files import read_facts
from src.errors import DataError
from src.storage.atomic_write import TEMPORARY, temporary_beside
from src.storage.space import room

FORMAT = 1  # of shards and what they are named by
INDEX_FORMAT = 2  # 1: index.json has the records of all pieces
STALE_SECONDS = 3600.0


class ShardWriter:
    """Appends documents; `close` renames the file in, so a shard under its final name is whole."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._path = folder / name
        self._temporary = temporary_beside(self._path)
        self._file = self._temporary.open("wb")
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._tokens = self._documents = self._text_bytes = self._empty = self._crc32 = 0

    def add(self, ids: NDArray[np.uint32], text_bytes: int) -> None:
        if text_bytes == 0:
            self._empty += 1
            return
        content = ids.astype(self._dtype).tobytes()
        with room(self._path, len(content)):
            self._file.write(content)
        self._crc32 = zlib.crc32(content, self._crc32)
        self._tokens += len(ids)
        self._documents += 1
        self._text_bytes += text_bytes

    def close(self) -> Shard:
        with room(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        return Shard(
            file=self._path.name,
            file_bytes=self._tokens * self._dtype.itemsize,
            tokens=self._tokens,
            documents=self._documents,
            text_bytes=self._text_bytes,
            empty=self._empty,
            crc32=self._crc32,
        )

    def discard(self) -> None:
        with suppress(OSError):  # a full disk refuses what is buffered once more
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_record(folder: Path, number: int, shards: dict[str, Shard], skipped: SkippedRows) -> None:
    record = {split: asdict(shard) for split, shard in shards.items()}
    write_json(folder / f"{number:05d}.json", record | ({"skipped": asdict(skipped)} if skipped.count else {}))


def finished(folder: Path, number: int) -> bool:
    """Whether a piece is done: its record exists, and its files have the recorded sizes."""
    try:
        shards = _shards(read_facts(folder / f"{number:05d}.json"))
    except (DataError, TypeError, AttributeError):
        return False
    return all(_size(folder / shard.file) == shard.file_bytes for shard in shards.values())


def write_index(folder: Path, pieces: int, dtype: str) -> None:
    """Write index.json from the records of all pieces, with a checksum of its own. Last: it makes the folder count."""
    records = [read_facts(folder / f"{number:05d}.json") for number in range(pieces)]
    table = PieceTable.of([_shards(record) for record in records])
    body: dict[str, object] = {"format": INDEX_FORMAT, "dtype": dtype, "pieces": len(table)}
    body |= {"crc32": table.write(folder), "fingerprint": table.fingerprint}
    if skipped := [record["skipped"] for record in records if "skipped" in record]:
        first = [BadRow(**row) for each in skipped for row in each["first"]][:PLACES_KEPT]
        body["skipped"] = {"rows": sum(each["count"] for each in skipped), "places": described(first)}
    write_json(folder / "index.json", body | {"checksum": fingerprint(body)})
    for path in folder.glob(f".*{TEMPORARY}"):  # left by killed preparers; one that is still at work has fresh ones
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            path.unlink(missing_ok=True)


class TokenStreams(ABC):
    """The two token streams of one source, each of segments that follow each other, memory-mapped. No document lies in
    two segments. A segment's file is looked at when it is first read; a launcher looks at all of them, once.

    `skipped_rows` of the source are not among them; `skipped_places` names the first, in the files as they lay then.
    """

    skipped_rows: int = 0
    skipped_places: Sequence[str] = ()

    def __init__(self, folder: Path, lengths: Mapping[str, ArrayLike], maps: OpenMaps | None) -> None:
        """`folder`: of the cache, which names the streams; `lengths`: tokens of the segments of each split; `maps`:
        where several streams share the descriptors.
        """
        self.folder = folder
        self._ends = {split: np.concatenate([[0], np.cumsum(lengths[split], dtype=np.int64)]) for split in SPLITS}
        self._maps = OpenMaps() if maps is None else maps

    @abstractmethod
    def documents(self, split: str) -> int: ...

    @abstractmethod
    def text_bytes(self, split: str) -> int: ...

    @abstractmethod
    def empty(self, split: str) -> int:
        """Documents without text, which are left out."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the tokens, independent of where the folder lies."""

    @abstractmethod
    def check_sizes(self) -> None:
        """Looks at every file once; DataError names each that is missing or has another size."""

    @abstractmethod
    def verify(self) -> None:
        """Reads what was written since it was last found right; DataError names each file that is wrong now."""

    @abstractmethod
    def _segment(self, split: str, number: int) -> NDArray[np.integer]:
        """Tokens of a segment that has some."""

    def notes(self) -> list[str]:
        """For the console, whenever they are opened by a launcher."""
        return []

    def tokens(self, split: str) -> int:
        return int(self._ends[split][-1])

    def segments(self, split: str) -> Iterator[tuple[int, NDArray[np.integer]]]:
        """Where each segment that has tokens begins in the stream, and its tokens, mapped and not read."""
        for number, (first, last) in enumerate(pairwise(self._ends[split].tolist())):
            if last > first:
                yield first, self._segment(split, number)

    def read(self, split: str, start: int, count: int) -> NDArray[np.int64]:
        """Tokens [start, start + count) of the stream, cut short at its end."""
        stop = min(start + count, self.tokens(split))
        number = int(np.searchsorted(self._ends[split], start, side="right")) - 1
        parts = []
        while start < stop:
            first, last = self._ends[split][number], self._ends[split][number + 1]
            if last > start:  # a shard may be empty, and an empty file cannot be mapped
                parts.append(self._segment(split, number)[start - first : min(stop, last) - first])
            start = int(last)
            number += 1
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


class TokenShards(TokenStreams):
    """Of a folder that this project wrote. Nothing but the index is read on opening."""

    def __init__(self, folder: Path, maps: OpenMaps | None = None) -> None:
        self.folder, body = folder, _read_index(folder)
        self._dtype = np.dtype(str(body["dtype"])).newbyteorder("<")
        if body["format"] == INDEX_FORMAT:
            self._where: PieceTable | tuple[int, int] = (body["pieces"], body["crc32"])
            table, self._fingerprint = self._table(), str(body["fingerprint"])
        else:
            table = self._where = PieceTable.of([_shards(record) for record in body["pieces"]])
            self._fingerprint = table.fingerprint
        super().__init__(folder, {split: table.column(split, "tokens") for split in SPLITS}, maps)
        counted = ("documents", "text_bytes", "empty")
        self._totals = {(split, name): int(table.column(split, name).sum()) for split in SPLITS for name in counted}
        self.skipped_rows = body.get("skipped", {}).get("rows", 0)
        self.skipped_places = body.get("skipped", {}).get("places", [])

    def documents(self, split: str) -> int:
        return self._totals[split, "documents"]

    def text_bytes(self, split: str) -> int:
        return self._totals[split, "text_bytes"]

    def empty(self, split: str) -> int:
        return self._totals[split, "empty"]

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def verify(self) -> None:
        """Reads every shard that was written since it was last found right; DataError names each that is wrong now.

        A terabyte takes minutes to read: once, not at every start.
        """
        memory = self.folder / "verified.json"
        known = read_memory(memory)
        everything = self._everything()
        stamps = {shard.file: [stamp(self.folder / shard.file)] for shard in everything}
        shards = [shard for shard in everything if known.get(shard.file) != stamps[shard.file]]
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            sums = list(pool.map(lambda shard: _crc32(self.folder / shard.file), shards))
        wrong = [shard.file for shard, checksum in zip(shards, sums, strict=True) if checksum != shard.crc32]
        if wrong:
            raise DataError(
                f"{self.folder / file}: corrupted (crc32 differs); {_remedy(self.folder)}" for file in wrong
            )
        settled = [shard.file for shard in shards if is_settled(self.folder / shard.file)]
        remember(memory, {file: stamps[file] for file in settled})

    def check_sizes(self) -> None:
        found = (_fault(self.folder / shard.file, shard.file_bytes) for shard in self._everything())
        if problems := [f"{problem}; {_remedy(self.folder)}" for problem in found if problem]:
            raise DataError(problems)

    def _everything(self) -> list[Shard]:
        table = self._table()
        return [shard for split in SPLITS for shard in table.shards(split)]

    def _table(self) -> PieceTable:
        """Mapped for as long as it is needed."""
        if isinstance(self._where, PieceTable):
            return self._where
        try:
            return PieceTable.read(self.folder, *self._where)
        except DataError as error:
            raise DataError(f"{error}; {_remedy(self.folder)}") from error

    def _segment(self, split: str, number: int) -> NDArray[np.integer]:
        path = self.folder / shard_name(number, split)
        first, last = self._ends[split][number], self._ends[split][number + 1]
        return self._maps.get(path, lambda: self._map(path, int(last - first)))

    def _map(self, path: Path, tokens: int) -> NDArray[np.integer]:
        if (problem := _fault(path, tokens * self._dtype.itemsize)) is not None:
            raise DataError(f"{problem}; {_remedy(self.folder)}")
        return np.memmap(path, self._dtype, mode="r")


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = read_facts(folder / "index.json")
    except DataError as error:
        raise DataError(f"{error}; {_remedy(folder)}") from error
    body = {key: index[key] for key in index if key != "checksum"} if isinstance(index, dict) else {}
    if not body or index.get("checksum") != fingerprint(body) or body["format"] not in (FORMAT, INDEX_FORMAT):
        raise DataError(f"{folder / 'index.json'}: corrupted (its checksum is wrong); {_remedy(folder)}")
    return body


def _shards(record: dict[str, dict[str, object]]) -> dict[str, Shard]:
    return {split: Shard(**record[split]) for split in SPLITS if split in record}  # type: ignore[arg-type]


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _fault(path: Path, size: int) -> str | None:
    """What is wrong with a file that shall have this many bytes; one look."""
    try:
        found = path.stat().st_size
    except OSError:
        return f"{path}: missing"
    return None if found == size else f"{path}: truncated or grown ({found} bytes, not {size})"


def _crc32(path: Path) -> int:
    checksum = 0
    for block in _blocks(path):
        checksum = zlib.crc32(block, checksum)
    return checksum


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            yield block


def _remedy(folder: Path) -> str:
    return f"delete {folder} and the next run makes it again"
