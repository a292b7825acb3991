"""Documents in files: plain text, JSON lines and parquet, read span by span so that one large file feeds many cores."""

import codecs
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import DataError

LARGEST_PIECE_BYTES = 256 << 20
ROW_SUFFIXES = (".jsonl", ".ndjson")
REFUSED_SUFFIXES = (".json", ".csv", ".tsv", ".arrow", ".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".bin", ".npy")


@dataclass(frozen=True)
class TextSpan:
    """Part of a source: bytes of a text or JSON lines file, row groups of a parquet file, else document numbers."""

    name: str
    start: int
    stop: int
    bytes: int = 0


def problem(path: Path) -> str | None:
    if path.suffix.lower() in REFUSED_SUFFIXES:
        return f"data.files: {path}: {path.suffix} is not read; convert it to .txt, .jsonl or .parquet"
    if not os.access(path, os.R_OK):
        return f"data.files: {path}: may not be read by this user; see its permissions"
    return None


def spans(path: Path, largest: int) -> list[TextSpan]:
    """Spans of at most about `largest` bytes; plain text is never cut, for a cut would invent documents."""
    size = path.stat().st_size
    if path.suffix.lower() in ROW_SUFFIXES:
        return [
            TextSpan(str(path), at, min(at + largest, size), min(largest, size - at)) for at in range(0, size, largest)
        ]
    if path.suffix.lower() == ".parquet":
        return _parquet_spans(path, largest)
    return [TextSpan(str(path), 0, size, size)] if size else []


def read(span: TextSpan, *, field: str, separator: str | None) -> Iterator[str]:
    """The documents of a span."""
    path = Path(span.name)
    try:
        if path.suffix.lower() in ROW_SUFFIXES:
            yield from _read_lines(span, field)
        elif path.suffix.lower() == ".parquet":
            yield from _read_parquet(span, field)
        else:
            yield from _read_text(path, separator)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def text_of(row: object, field: str, where: str) -> str:
    """The text of a row under `field`. DataError when there is none."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is {type(row).__name__}, not an object with the field {field!r}")
    if field not in row:
        raise DataError(f"{where}: no field {field!r} (data.field); the row has {', '.join(map(repr, sorted(row)))}")
    if not isinstance(row[field], str):
        raise DataError(f"{where}: field {field!r} (data.field) holds {type(row[field]).__name__}, not text")
    return _whole(str(row[field]))


def _whole(text: str) -> str:
    """With ? for each half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def _read_text(path: Path, separator: str | None) -> Iterator[str]:
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


def _read_lines(span: TextSpan, field: str) -> Iterator[str]:
    """Lines whose first byte lies inside the span, so that neighbouring spans share none and lose none."""
    with Path(span.name).open("rb") as file:
        if span.start:
            file.seek(span.start - 1)
            file.readline()
        while (at := file.tell()) < span.stop:
            line = file.readline()
            if line.strip():
                yield _line_text(line, field, span.name, at)


def _line_text(line: bytes, field: str, name: str, at: int) -> str:
    try:
        return text_of(json.loads(line), field, name)
    except (ValueError, DataError) as error:
        number = _line_number(name, at)
        reason = str(error).removeprefix(f"{name}: ") if isinstance(error, DataError) else f"not JSON ({error})"
        raise DataError(f"{name}, line {number}: {reason}") from error


def _line_number(name: str, at: int) -> int:
    """Counted only for an error: a worker starts in the middle of a file and does not know its line."""
    with Path(name).open("rb") as file:
        return 1 + sum(file.read(min(1 << 20, at - start)).count(b"\n") for start in range(0, at, 1 << 20))


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


def _read_parquet(span: TextSpan, field: str) -> Iterator[str]:
    file = _parquet(Path(span.name))
    columns = file.schema_arrow.names
    if field not in columns:
        raise DataError(f"{span.name}: no field {field!r} (data.field); the columns are {', '.join(columns)}")
    row = sum(file.metadata.row_group(number).num_rows for number in range(span.start))
    for batch in file.iter_batches(1024, row_groups=list(range(span.start, span.stop)), columns=[field]):
        for value in batch.column(0).to_pylist():
            yield text_of({field: value}, field, f"{span.name}, row {row}")
            row += 1


def _parquet(path: Path) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def _decode(content: bytes, name: str, first_line: int = 1) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise DataError(
            f"{name}, line {line}: not UTF-8 text (byte {error.start} of its document): {error.reason}"
        ) from error
