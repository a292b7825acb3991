"""How far a preparation is: a bar for a person who waits, or lines for a log, with speed, time left and disk space."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from src.data.mapped.piece_table import SPLITS
from src.data.shards import finished
from src.data.sources import Piece
from src.data.tokenizer_formats.hub_files import read_facts

EVERY_SECONDS = 30.0


class Progress(Protocol):
    """Shows the pieces of one source. `look`: to be called now and then, and whenever a piece is done."""

    def __call__(self, name: str, folder: Path, pieces: Sequence[Piece], /) -> Any:
        """A context manager that gives `look`."""


@dataclass(frozen=True)
class Amounts:
    """Of a source, as far as its pieces are done."""

    pieces: int
    text_bytes: int
    tokens: int
    shard_bytes: int
    source_bytes: int  # in its files, where they say


class Progressed:
    """Looks at the records that all preparers of a folder leave; each is read once."""

    def __init__(self, name: str, folder: Path, pieces: Sequence[Piece]) -> None:
        self.name = name
        self.folder = folder
        self._sizes = [sum(span.bytes for span in piece.spans) for piece in pieces]
        self._done: dict[int, tuple[int, int, int]] = {}  # text bytes, tokens, shard bytes
        self._began = time.monotonic()
        self._before = self.amounts()

    def amounts(self) -> Amounts:
        """What is done now, by whomever."""
        there = set(os.listdir(self.folder))
        for number in range(len(self._sizes)):
            if number not in self._done and f"{number:05d}.json" in there and finished(self.folder, number):
                self._done[number] = _record(self.folder, number)
        text, tokens, shards = (sum(each[at] for each in self._done.values()) for at in range(3))
        return Amounts(len(self._done), text, tokens, shards, sum(self._sizes[number] for number in self._done))

    def line(self) -> str:
        """Pieces, text, MB/s since this preparer began, time left, and bytes of shards now and in the end."""
        now, seconds = self.amounts(), time.monotonic() - self._began
        line = f"{self.name}: {now.pieces:,} of {len(self._sizes):,} pieces"
        if not now.text_bytes:
            return line
        whole, part = (sum(self._sizes), now.source_bytes) if now.source_bytes else (len(self._sizes), now.pieces)
        total = now.text_bytes * whole / part
        rate = (now.text_bytes - self._before.text_bytes) / seconds if seconds > 0 else 0.0
        line += f", {told_bytes(now.text_bytes)} of {told_bytes(total)} of text"
        line += f" at {rate / 1e6:.2f} MB/s" if rate else ""
        line += (
            f", {told_seconds((total - now.text_bytes) / rate)} left" if rate and now.pieces < len(self._sizes) else ""
        )
        shards = now.shard_bytes * total / now.text_bytes
        return f"{line}; shards {told_bytes(now.shard_bytes)} of {told_bytes(shards)}"


def _record(folder: Path, number: int) -> tuple[int, int, int]:
    record = read_facts(folder / f"{number:05d}.json")
    shards = [record[split] for split in SPLITS if split in record]
    text, tokens, size = (sum(shard[key] for shard in shards) for key in ("text_bytes", "tokens", "file_bytes"))
    return text, tokens, size


def told_bytes(count: float) -> str:
    """Powers of 1000, as disks and files are sold."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.0f} kB"


def told_seconds(seconds: float) -> str:
    """The two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def quiet(_name: str, _folder: Path, _pieces: Sequence[Piece]) -> Iterator[Callable[[], None]]:
    """Shows nothing."""
    yield lambda: None


@contextmanager
def bar(name: str, folder: Path, pieces: Sequence[Piece]) -> Iterator[Callable[[], None]]:
    """On a terminal; gone when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("pieces"))
    console = Console(stderr=True, markup=False, emoji=False)
    seen = Progressed(name, folder, pieces)
    with Bars(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        task = bars.add_task(f"tokenising {name}", total=len(pieces), completed=seen.amounts().pieces)
        yield lambda: bars.update(task, completed=seen.amounts().pieces)


class ProgressLines:
    """A line for the log now and then, and a last one for each source, whose amounts are kept."""

    def __init__(self, tell: Callable[[str], None], every_seconds: float = EVERY_SECONDS) -> None:
        self._tell = tell
        self._every = every_seconds
        self.sources: dict[str, Amounts] = {}

    @contextmanager
    def __call__(self, name: str, folder: Path, pieces: Sequence[Piece]) -> Iterator[Callable[[], None]]:
        seen, last = Progressed(name, folder, pieces), time.monotonic()

        def look() -> None:
            nonlocal last
            if time.monotonic() - last >= self._every:
                self._tell(seen.line())
                last = time.monotonic()

        self._tell(seen.line())
        try:
            yield look
        finally:
            self._tell(seen.line())
            self.sources[name] = seen.amounts()
