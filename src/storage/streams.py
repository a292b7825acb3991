"""What is printed for somebody who may not want all of it, or on a narrow terminal."""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TextIO

COPIED = ("python ", "mv ", "cp ", "ssh ", "pip ", "`")  # in lines with a command to copy
FEWEST_COLUMNS = 40
Tell = Callable[[Iterable[str]], None]  # of lines, to a person
_COLUMNS = re.compile(r".*\s{2}(?=\S)")  # up to where the last column begins, two blanks behind the one before


class ReaderMayLeave(AbstractContextManager[None, bool]):
    """A block that ends quietly where nobody reads its output any more, as behind `| head`."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            sys.stdout.flush()
        except BrokenPipeError as broken:
            error = error or broken
        if not isinstance(error, BrokenPipeError):
            return False
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        return True


def columns(stream: TextIO, most: int) -> int:
    """Of the terminal that `stream` is, at most `most`; elsewhere `most`."""
    if not stream.isatty():
        return most
    return min(most, max(FEWEST_COLUMNS, shutil.get_terminal_size().columns))


def folded(text: str, stream: TextIO) -> str:
    """`text` as it is shown on `stream`: a line that is wider than a terminal is broken between words. Elsewhere, and
    where it has a command to copy, a line stays one line.
    """
    return readable(text, columns(stream, sys.maxsize))


def readable(text: str, width: int) -> str:
    """Each line of `text` in pieces of at most `width`, but those with a command to copy."""
    return "\n".join(line if any(word in line for word in COPIED) else broken(line, width) for line in text.split("\n"))


def to_stderr(lines: Iterable[str]) -> None:
    """A line each, on a terminal broken between words."""
    print(*(f"{folded(line, sys.stderr)}\n" for line in lines), sep="", end="", file=sys.stderr, flush=True)


def broken(line: str, width: int) -> str:
    """`line` in pieces of at most `width`, but for longer words; what follows begins below its last column."""
    if len(line) <= width:
        return line
    column = _COLUMNS.match(line)
    hang = column.end() if column is not None and column.end() <= 2 * width // 3 else 2
    pieces = textwrap.wrap(line, width, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False)
    return "\n".join(pieces)
