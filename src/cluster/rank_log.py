"""Logs of ranks: stdout and stderr of each rank go to its log file, rank 0's to the terminal as well."""

import io
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO, cast

_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-Z\\-_]")


def open_closed_streams() -> None:
    """Lead descriptors 0 to 2 that were closed (`>&-`) to nowhere, or the next files opened would be taken for them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 (as long as the process)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def keep_log(path: Path, *, terminal: bool) -> None:
    """Send descriptors 1 and 2 to the end of `path`; with `terminal`, Python's own output is also shown where it was.

    The descriptors themselves move, so that a crash in C++, NCCL's warnings and child processes are in the log too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    shown = [os.dup(1), os.dup(2)] if terminal else []
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        cast(io.TextIOWrapper, stream).reconfigure(line_buffering=True, errors="backslashreplace")
    if terminal:
        sys.stdout = cast(TextIO, Screen(shown[0], sys.stdout))
        sys.stderr = cast(TextIO, Screen(shown[1], sys.stderr))


def only_log() -> None:
    """From here on write to the log alone; what a progress line left unfinished on the terminal is ended."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, Screen):
            setattr(sys, name, stream.close_screen())


class Screen(io.TextIOBase):
    """A terminal (or pipe) whose finished lines are kept in a log as well.

    It answers `isatty` for the terminal, so that rich may draw. A one-line progress redraws itself with carriage
    returns; only what stands when the line ends reaches the log, without colours.
    """

    def __init__(self, descriptor: int, log: TextIO) -> None:
        self._screen: TextIO | None = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", errors="replace")
        self._isatty = self._screen.isatty()
        self._descriptor = descriptor
        self._log = log
        self._line = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def isatty(self) -> bool:
        return self._isatty and self._screen is not None

    def fileno(self) -> int:
        return self._descriptor

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._show(text)
        *whole, self._line = (self._line + text).split("\n")
        for line in whole:
            with suppress(OSError):  # a full disk: words are no reason to end a run
                self._log.write(_kept(line) + "\n")
        self._line = self._line[max(self._line.rfind("\r"), 0) :]  # hours of redrawing must not pile up
        return len(text)

    def flush(self) -> None:
        self._show(None)

    def close_screen(self) -> TextIO:
        """The log, after the unfinished line went to it."""
        if _kept(self._line):
            self.write("\n")
        self.flush()
        return self._log

    def _show(self, text: str | None) -> None:
        if self._screen is None:
            return
        try:
            if text is None:
                self._screen.flush()
            else:
                self._screen.write(text)
        except OSError:  # the terminal was closed or the pipe's reader left: the run goes on, its log too
            self._screen = None


def _kept(line: str) -> str:
    """What a reader of the terminal sees of this line in the end."""
    return _ESCAPE.sub("", line.rstrip("\r")).rpartition("\r")[2]
