"""Append-only files of one JSON object a line, which survive a kill in the middle of a line."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from src.storage.space import room, write_all
from src.storage.usable import usable

METRICS_FILE = "metrics.jsonl"  # of a run folder: every number, of every attempt
TAIL_BYTES = 65536
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Lines:
    """UnusableFileError from all that opens the file, where it is there and this user may not open it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """One write of one line, in the kernel's hands on return: a kill of this process cannot lose it. OSError."""
        text = json.dumps({key: _legal(value) for key, value in record.items()}, allow_nan=False, default=float)
        line = text.encode() + b"\n"
        with self._open("ab+", buffering=0) as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a line torn by a kill: close it, so that this one stands alone
                    line = b"\n" + line
            with room(self.path, len(line)):
                write_all(file.fileno(), line)

    def read(self) -> Iterator[dict[str, Any]]:
        """Every whole record from the first to the last; torn lines are left out."""
        if self.path.exists():
            with self._open("rb") as file:
                yield from _records(file)

    def since(self, place: int) -> tuple[list[dict[str, Any]], int]:
        """Whole records from byte `place` on, and the place behind them: what is asked again costs what is new."""
        try:
            with self._open("rb") as file:
                file.seek(place)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return [], 0
        return list(_records(whole.splitlines())), place + len(whole) + 1 if whole else place

    def last(self) -> dict[str, Any] | None:
        """The last whole record, without reading a long file from its start."""
        return next(self.recent(), None)

    def recent(self) -> Iterator[dict[str, Any]]:
        """Whole records of the last 64 KiB, newest first."""
        return _records(reversed(self._tail().splitlines()))

    def newest(self, *names: str) -> dict[str, Any]:
        """The newest value of each name, as far as the last 64 KiB have it: one small read of however long a file."""
        tail = self._tail()
        known: dict[int, dict[str, Any]] = {}  # by the end of the line: one line has most of the names
        found: dict[str, Any] = {}
        for name in names:
            for place in _places(tail, json.dumps(name).encode() + b":"):
                line = _line_at(tail, place)
                if line.stop not in known:
                    known[line.stop] = next(_records([tail[line]]), {})
                if name in known[line.stop]:
                    found[name] = known[line.stop][name]
                    break
        return found

    def _tail(self) -> bytes:
        try:
            with self._open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
                return file.read()
        except FileNotFoundError:
            return b""

    def _open(self, mode: str, buffering: int = -1) -> IO[bytes]:
        with usable(self.path, "read" if mode == "rb" else "written"):
            return open(self.path, mode, buffering)


def facts_in(path: Path) -> dict[str, Any]:
    """A JSON object as it lies there; empty where it is missing or cut short."""
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _places(tail: bytes, key: bytes) -> Iterator[int]:
    """Where this text stands, the last place first."""
    place = tail.rfind(key)
    while place >= 0:
        yield place
        place = tail.rfind(key, 0, place)


def _line_at(tail: bytes, place: int) -> slice:
    end = tail.find(b"\n", place)
    return slice(tail.rfind(b"\n", 0, place) + 1, len(tail) if end < 0 else end)


def _records(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield {key: NOT_FINITE.get(value, value) if isinstance(value, str) else value
                   for key, value in record.items()}  # fmt: skip


def _legal(value: Any) -> Any:
    """JSON has no NaN: it is kept as text, which `read` turns back."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
