"""Documents in files: plain text, JSON lines and parquet, read span by span so that one large file feeds many cores."""

import codecs
import json
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import DataError, some

ROW_SUFFIXES = (".jsonl", ".ndjson")
# Of the files that stand for text where a whole folder is named.
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", *ROW_SUFFIXES, ".parquet")
LARGEST_PIECE_BYTES = 256 << 20
LONGEST_REASON = 200
REFUSED_SUFFIXES = (".json", ".csv", ".tsv", ".arrow", ".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".bin", ".npy")


@dataclass(frozen=True)
class TextSpan:
    """Part of a source: bytes of a text or JSON lines file, row groups of a parquet file, else document numbers."""

    name: str
    start: int
    stop: int
    bytes: int = 0


@dataclass(frozen=True)
class BadRow:
    """A row, or a document of a plain text file, that is no text: where it stands and why."""

    file: str
    reason: str
    place: str = ""
    """Such as "row 7" or "line 7"; empty: the line that begins at `offset` of the file."""
    offset: int = 0
    repaired: str | None = None
    """The text that stands for it where bad rows are not skipped; None: such a row is refused there."""


def problem(path: Path) -> str | None:
    if path.suffix.lower() in REFUSED_SUFFIXES:
        return f"data.files: {path}: {path.suffix} is not read; convert it to .txt, .jsonl or .parquet"
    if not os.access(path, os.R_OK):
        return f"data.files: {path}: may not be read by this user; see its permissions"
    return None


def named_inside(folder: str, suffixes: Collection[str]) -> Iterator[str]:
    """Names of the files under a folder, at any depth, that have one of the suffixes; links to folders are not
    followed.

    Judged by name before anything else: of a home folder's million files a few are meant.
    """
    for place, _, names in os.walk(folder):
        yield from (os.path.join(place, name) for name in names if os.path.splitext(name)[1].lower() in suffixes)


def spans(path: Path, largest: int) -> list[TextSpan]:
    """Spans of at most about `largest` bytes; plain text is never cut, for a cut would invent documents."""
    with readable(path):
        size = path.stat().st_size
    if path.suffix.lower() in ROW_SUFFIXES:
        return [
            TextSpan(str(path), at, min(at + largest, size), min(largest, size - at)) for at in range(0, size, largest)
        ]
    if path.suffix.lower() == ".parquet":
        return _parquet_spans(path, largest)
    return [TextSpan(str(path), 0, size, size)] if size else []


def read(span: TextSpan, *, field: str, separator: str | None) -> Iterator[str | BadRow]:
    """The documents of a span and, in their places, the rows that are none. DataError when the whole file is bad."""
    path = Path(span.name)
    with readable(path):
        if path.suffix.lower() in ROW_SUFFIXES:
            yield from _read_lines(span, field)
        elif path.suffix.lower() == ".parquet":
            yield from _read_parquet(span, field)
        else:
            yield from _read_text(path, separator)


def text_of(row: object, field: str, file: str, *, place: str = "", offset: int = 0) -> str | BadRow:
    """The text of a row under `field`."""
    if not isinstance(row, dict):
        reason = f"a row is {type(row).__name__}, not an object with the field {field!r}"
    elif field not in row:
        reason = f"no field {field!r} (data.field); the row has {some(map(repr, row), 8) or 'none'}"
    elif not isinstance(text := row[field], str):
        reason = f"field {field!r} (data.field) holds {type(text).__name__}, not text"
    else:
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair, UTF-8 cannot
            reason, repaired = "half a surrogate pair, which is no text", text.encode(errors="replace").decode()
            return BadRow(file, reason, place, offset, repaired)
        return str(text)
    return BadRow(file, reason[:LONGEST_REASON], place, offset)


def described(rows: Iterable[BadRow]) -> list[str]:
    """File, row or line, and reason of each; `rows` in the order of their files.

    A worker starts in the middle of a file and does not know its line: lines are counted here, once through a file.
    """
    found: list[str] = []
    name, at, line = "", 0, 1
    for row in rows:
        place = row.place
        if not place:
            if row.file != name or row.offset < at:
                name, at, line = row.file, 0, 1
            line, at = line + _line_ends(name, at, row.offset), row.offset
            place = f"line {line}"
        found.append(f"{row.file}, {place}: {row.reason}")
    return found


def _line_ends(name: str, start: int, stop: int) -> int:
    with readable(Path(name)), Path(name).open("rb") as file:
        file.seek(start)
        return sum(file.read(min(1 << 20, stop - at)).count(b"\n") for at in range(start, stop, 1 << 20))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What the system says against reading the file in here becomes a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_text(path: Path, separator: str | None) -> Iterator[str | BadRow]:
    """One document, or those between separators; without the mark that some editors put in front of UTF-8."""
    if separator is None:
        yield _decode(path.read_bytes().removeprefix(codecs.BOM_UTF8), str(path))
        return
    mark = separator.encode()
    rest, line, cuts, crlf = b"", 1, 0, False
    with path.open("rb") as file:
        first = True
        while block := file.read(1 << 20):
            crlf = crlf or b"\r\n" in block
            *whole, rest = (rest + (block.removeprefix(codecs.BOM_UTF8) if first else block)).split(mark)
            first = False
            cuts += len(whole)
            for part in whole:
                yield _decode(part, str(path), line)
                line += part.count(b"\n") + mark.count(b"\n")
    if crlf and not cuts and b"\n" in mark and b"\r" not in mark:
        raise DataError(
            f"{path}: its lines end with \\r\\n, so that data.separator={separator!r} is nowhere in it; pass it with "
            "\\r\\n, or convert the file"
        )
    yield _decode(rest, str(path), line)


def _read_lines(span: TextSpan, field: str) -> Iterator[str | BadRow]:
    """Lines whose first byte lies inside the span, so that neighbouring spans share none and lose none."""
    with Path(span.name).open("rb") as file:
        if span.start:
            file.seek(span.start - 1)
            file.readline()
        while (at := file.tell()) < span.stop and (line := file.readline()):
            if line.strip():
                yield _line_text(line, field, span.name, at)


def _line_text(line: bytes, field: str, name: str, at: int) -> str | BadRow:
    try:
        row = json.loads(line.rstrip(b"\r\n"))
    except UnicodeDecodeError as error:
        return BadRow(name, f"not UTF-8 text (byte {error.start} of its line): {error.reason}", offset=at)
    except ValueError as error:
        return BadRow(name, f"not JSON ({error})"[:LONGEST_REASON], offset=at)
    except RecursionError:
        return BadRow(name, "not JSON that can be read (nested too deeply)", offset=at)
    return text_of(row, field, name, offset=at)


def _parquet_spans(path: Path, largest: int) -> list[TextSpan]:
    groups = _parquet(path).metadata
    sizes = [groups.row_group(number).total_byte_size for number in range(groups.num_row_groups)]
    found: list[TextSpan] = []
    start = 0
    for stop in range(1, len(sizes) + 1):
        if sum(sizes[start:stop]) >= largest or stop == len(sizes):
            found.append(TextSpan(str(path), start, stop, sum(sizes[start:stop])))
            start = stop
    return found


def _read_parquet(span: TextSpan, field: str) -> Iterator[str | BadRow]:
    import pyarrow

    file = _parquet(Path(span.name))
    columns = file.schema_arrow.names
    if field not in columns:
        raise DataError(f"{span.name}: no field {field!r} (data.field); the columns are {some(columns, 20)}")
    number = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
    batches = file.iter_batches(1024, row_groups=list(range(span.start, span.stop)), columns=[field])
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{span.name}, row {number} or one of the next 1024: cannot be read: {error}") from error
        if batch is None:
            return
        for value in _values(batch.column(0)):
            place = f"row {number}"
            if isinstance(value, UnicodeDecodeError):
                reason = f"not UTF-8 text (byte {value.start} of its field): {value.reason}"
                yield BadRow(span.name, reason, place)
            else:
                yield value if isinstance(value, str) else text_of({field: value}, field, span.name, place=place)
            number += 1


def _values(column: Any) -> Iterator[Any]:
    """Of a column; in the place of one that is not UTF-8, though its type says so, the error."""
    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:
        for value in column:
            try:
                yield value.as_py()
            except UnicodeDecodeError as error:
                yield error


def _parquet(path: Path) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def _decode(content: bytes, name: str, first_line: int = 1) -> str | BadRow:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        return BadRow(name, f"not UTF-8 text (byte {error.start} of its document): {error.reason}", f"line {line}")
