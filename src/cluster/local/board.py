"""One table of the runs that share this machine: live in a terminal, lines in a file."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from src.runs.folder import attempts
from src.storage.json_lines import METRICS_FILE, Lines

LOOK_SECONDS = 2.0


class Sharing(Protocol):
    """What the table asks of who starts the runs."""

    @property
    def live(self) -> Mapping[Path, tuple[Any, Any, tuple[int, ...]]]: ...
    @property
    def codes(self) -> Mapping[Path, int]: ...


class Board:
    """Reads the ends of the runs' logs, every two seconds and only where a terminal shows them."""

    def __init__(self, pack: Sharing, folders: Sequence[Path], clock: Callable[[], float] = time.monotonic) -> None:
        self._pack, self._folders, self._clock = pack, folders, clock
        self._console = Console(stderr=True, markup=False, emoji=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._next = 0.0

    def tell(self, line: str) -> None:
        """A line of its own; above the table where there is one."""
        if self._console.is_terminal:
            self._live.console.print(line, highlight=False)
            self._next = 0.0
        else:
            print(line, file=sys.stderr, flush=True)

    def look(self) -> None:
        """Draw what has changed, if it is time."""
        if self._console.is_terminal and self._clock() >= self._next:
            self._next = self._clock() + LOOK_SECONDS
            self._live.update(self.table(), refresh=True)

    def table(self) -> Table:
        """A row for each run."""
        table = Table("run", "state", "attempt", "step", "loss", "on", box=None)
        for folder in self._folders:
            tried, told = attempts(folder), Lines(folder / METRICS_FILE).newest("step", "loss")
            _, _, slots = self._pack.live.get(folder, (None, None, ()))
            state = "running" if folder in self._pack.live else "waiting"
            if folder in self._pack.codes and folder not in self._pack.live:
                state = (tried[-1].ended if tried else None) or f"code {self._pack.codes[folder]}"
            loss = f"{told['loss']:.4f}" if "loss" in told else ""
            places = ",".join(map(str, slots))
            table.add_row(folder.name, state, str(len(tried) or ""), str(told.get("step", "")), loss, places)
        return table

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()
            self._console.print(self.table())
