"""Rows of a token stream, by number: neighbouring windows of it, or documents packed by best fit."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from src.data.fingerprint import write_json
from src.data.packing.best_fit import Flags, Pieces, Signed, best_fit, cut_to_fit, laid_out
from src.data.packing.rules import RowRules
from src.data.shards import TokenStreams
from src.data.tokenizer_formats.hub_files import read_facts
from src.errors import DataError
from src.storage.atomic_write import temporary_beside
from src.storage.space import room

TOGETHER = 1 << 16  # documents that are packed at once: more would save no padding and cost memory
BLOCK = 1 << 22  # tokens that are looked at together


class Rows(ABC):
    """Rows of at most seq_len + 1 tokens each, of which all but the first are predicted."""

    count: int

    @abstractmethod
    def read(self, number: int) -> Signed:
        """Tokens of a row."""

    def notes(self) -> list[str]:
        """What of the documents they cut and how much of them is padding, for a person."""
        return []


class Windows(Rows):
    """seq_len tokens after seq_len tokens, whatever begins or ends among them.

    Without a mark in front, a window begins with the last token of the one before it. Training drops the last tokens
    that fill none (fewer than seq_len); validation has them in a shorter row.
    """

    def __init__(self, streams: TokenStreams, split: str, seq_len: int, bos: int | None) -> None:
        self._streams, self._split, self._seq_len, self._bos = streams, split, seq_len, bos
        predicted = max(streams.tokens(split) - (bos is None), 0)
        self.count = predicted // seq_len if split == "train" else -(-predicted // seq_len)

    def read(self, number: int) -> Signed:
        found = self._streams.read(self._split, number * self._seq_len, self._seq_len + 1)
        if self._bos is None or found[0] == self._bos:
            return found
        return np.concatenate([np.array([self._bos], np.int64), found[: self._seq_len]])


@dataclass(frozen=True)
class PackedFacts:
    """What stands beside packed rows."""

    rows: int
    pieces: int
    documents: int  # of at least two tokens
    cut: int  # of them longer than a row
    cut_by_windows: int  # of them that concatenation would cut
    predicted: int  # tokens that have a label

    def __add__(self, other: Self) -> "PackedFacts":
        return PackedFacts(*(mine + theirs for mine, theirs in zip(_values(self), _values(other), strict=True)))


def _values(facts: PackedFacts) -> tuple[int, ...]:
    return tuple(asdict(facts).values())


class PackedRows(Rows):
    """Rows that `pack` wrote, memory-mapped. DataError where a file of theirs is not whole."""

    def __init__(self, folder: Path, streams: TokenStreams, split: str, seq_len: int, bos: int | None) -> None:
        facts = read_facts(folder / "rows.json")
        self.facts = PackedFacts(**facts)
        self.count = self.facts.rows
        self._streams, self._split, self._seq_len, self._bos = streams, split, seq_len, bos
        self._pieces = _mapped(folder / "pieces.bin", self.facts.pieces).reshape(-1, 2)
        self._stops = _mapped(folder / "stops.bin", self.facts.rows)

    def read(self, number: int) -> Signed:
        first = int(self._stops[number - 1]) if number else 0
        pieces = self._pieces[first : int(self._stops[number])].tolist()
        parts = [self._streams.read(self._split, at, length) for at, length in pieces]
        if self._bos is not None and parts[0][0] != self._bos:
            parts.insert(0, np.array([self._bos], np.int64))
        return np.concatenate(parts)

    def notes(self) -> list[str]:
        facts = self.facts
        if not facts.rows:
            return []
        shares = [100 * each / max(facts.documents, 1) for each in (facts.cut, facts.cut_by_windows)]
        padding = 100 * (1 - facts.predicted / (facts.rows * self._seq_len))
        return [
            f"{facts.rows:,} rows of {self._seq_len:,} by best fit: {shares[0]:.1f} % of {facts.documents:,} documents "
            f"are longer than a row and cut ({shares[1]:.1f} % by concatenation), {padding:.2f} % is padding"
        ]


def _mapped(path: Path, count: int) -> Signed:
    wanted = 2 * count if path.name == "pieces.bin" else count
    if not path.is_file() or path.stat().st_size != 8 * wanted:
        raise DataError(f"{path}: missing or cut off; delete {path.parent} and the next run packs it again")
    return np.memmap(path, "<i8", "r") if wanted else np.zeros(0, np.int64)


def rows_of(streams: TokenStreams, split: str, seq_len: int, rules: RowRules) -> Rows:
    """Rows of a stream; packed ones are computed the first time, and kept beside its index."""
    if rules.packing == "concatenate":
        return Windows(streams, split, seq_len, rules.bos)
    assert rules.eos is not None, "prepare refuses a tokenizer without an end of document"
    name = f"{split}-{seq_len}-{rules.eos}" + (f"-{rules.bos}" if rules.bos is not None else "")
    folder = streams.folder / "rows" / name
    if not (folder / "rows.json").is_file():
        pack(streams, split, seq_len, rules, folder)
    return PackedRows(folder, streams, split, seq_len, rules.bos)


def pack(streams: TokenStreams, split: str, seq_len: int, rules: RowRules, folder: Path) -> None:
    """Write the rows of a stream; the same bytes whoever writes them. 65,536 documents at a time are in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    total = PackedFacts(0, 0, 0, 0, 0, 0)
    targets = [folder / "pieces.bin", folder / "stops.bin"]
    drafts = [temporary_beside(path) for path in targets]
    try:
        with room(folder), drafts[0].open("wb") as of_pieces, drafts[1].open("wb") as of_stops:
            for starts, stops, begun, ended in _documents(streams, split, rules):
                marks = rules.bos is not None
                found = cut_to_fit(starts, stops, begun | (not marks), ended, seq_len, marks=marks)
                rows = best_fit(found, seq_len, marks=marks)
                table = laid_out(found, rows)
                of_pieces.write(table.astype("<i8").tobytes())
                sizes = np.cumsum([len(row) for row in rows]) + total.pieces
                of_stops.write(sizes.astype("<i8").tobytes())
                cut = _facts(starts, stops, begun | (not marks), seq_len, marks=marks)
                total += cut + _filled(found, rows, table, marks=marks)
        for draft, target in zip(drafts, targets, strict=True):
            draft.replace(target)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)
    write_json(folder / "rows.json", asdict(total))


def _facts(starts: Signed, stops: Signed, begun: Flags, seq_len: int, *, marks: bool) -> PackedFacts:
    """Of documents: how many are cut, and how many windows would cut."""
    room_of = seq_len + 1 - (marks & ~begun).astype(np.int64)
    first = starts // seq_len * seq_len  # where the window begins that has the first token
    cut, by_windows = stops - starts > room_of, stops > first + seq_len + (not marks)
    return PackedFacts(0, 0, len(starts), int(cut.sum()), int(by_windows.sum()), 0)


def _filled(pieces: Pieces, rows: list[list[int]], table: Signed, *, marks: bool) -> PackedFacts:
    """Of rows: all tokens but the first of each are predicted, and that one too where a mark stands in front."""
    in_front = sum(marks and not pieces.begun[row[0]] for row in rows)
    return PackedFacts(len(rows), len(table), 0, 0, 0, int(table[:, 1].sum()) + in_front - len(rows))


def _documents(streams: TokenStreams, split: str, rules: RowRules) -> Iterator[tuple[Signed, Signed, Flags, Flags]]:
    """Starts and stops in the stream of documents of at least two tokens, whether they begin with a mark of their own,
    and whether they end with one; 65,536 at a time, from as many segments as that takes.
    """
    waiting: list[NDArray[np.int64]] = []  # rows of start, stop, begun, ended
    count = 0
    for first, ids in streams.segments(split):
        blocks = range(0, len(ids), BLOCK)
        stops = np.concatenate([np.flatnonzero(ids[at : at + BLOCK] == rules.eos) + at + 1 for at in blocks])
        ended = np.ones(len(stops), np.int64)
        if not len(stops) or stops[-1] < len(ids):
            stops, ended = np.append(stops, len(ids)), np.append(ended, 0)
        starts = np.concatenate([[0], stops[:-1]])
        begun = (ids[starts] == (-1 if rules.bos is None else rules.bos)).astype(np.int64)
        table = np.stack([starts + first, stops + first, begun, ended], axis=1)[stops - starts > 1]
        for at in range(0, len(table), TOGETHER):
            part = table[at : at + TOGETHER]
            if waiting and count + len(part) > TOGETHER:
                yield _columns(waiting)
                waiting, count = [], 0
            waiting.append(part)
            count += len(part)
    if count:
        yield _columns(waiting)


def _columns(tables: list[NDArray[np.int64]]) -> tuple[Signed, Signed, Flags, Flags]:
    starts, stops, begun, ended = np.concatenate(tables).T
    return starts, stops, begun.astype(bool), ended.astype(bool)
