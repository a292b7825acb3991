"""Progress on the console: a live line in a terminal, plain lines in a file."""

from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn

from src.storage.streams import readable

# metric, text; in this order, where the record has it: a narrow terminal cuts the end
COLUMNS: tuple[tuple[str, str], ...] = (
    ("loss", "loss {:.4f}"),
    ("tokens_per_second", "{:,.0f} tok/s"),
    ("mfu_full_percent", "MFU {:.1f}%"),
    ("mfu_causal_percent", "({:.1f}% causal)"),
    ("groups/participants", "{:.0f} groups"),
    ("grad_norm", "grad norm {:.3f}"),
    ("mtp_loss", "mtp loss {:.4f}"),
    ("lr", "lr {:.2e}"),
    ("experts/load_max_over_mean", "busiest expert {:.1f}x"),
    ("data_seconds", "data {:.3f} s"),
    ("peak_reserved_gib", "{:.1f} GiB"),
    ("peak_rss_gib", "{:.1f} GiB"),
)


def format_record(values: Mapping[str, float], width: int | None = None) -> str:
    """The values that a person watches; tok/s are those of one device. `width`: letters at most, in whole values."""
    found = ""
    for each in (text.format(values[name]) for name, text in COLUMNS if name in values):
        longer = f"{found}  {each}" if found else each
        if width is not None and len(longer) > width:
            break
        found = longer
    return found


def format_validation(step: int, loss: float) -> str:
    return f"step {step}  validation loss {loss:.4f}"


def format_startup(seconds: Mapping[str, float]) -> str:
    stages = "  ".join(f"{stage.replace('_', ' ')} {spent:.1f} s" for stage, spent in seconds.items())
    return f"startup {sum(seconds.values()):.1f} s:  {stages}"


def format_left(steps: int, step_seconds: float) -> str:
    return f"ETA {timedelta(seconds=round(steps * step_seconds))}"


class Console:
    """Redraws only when called, so it costs nothing between two records."""

    def __init__(self, steps: int, terminal: Terminal | None = None, *, title: str = "") -> None:
        """`title`: of one among several consoles on one terminal, which then have whole lines only."""
        self._steps, self._title = steps, title
        self._terminal = terminal or Terminal(
            soft_wrap=True, markup=False, emoji=False, force_terminal=False if title else None
        )
        self._progress: Progress | None = None
        if self._terminal.is_terminal and steps > 0:
            self._progress = Progress(
                BarColumn(bar_width=20),
                TextColumn("{task.completed}/{task.total}  {task.description}"),
                console=self._terminal,
                auto_refresh=False,
            )
            self._task = self._progress.add_task("starting", total=steps)
            self._progress.start()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """A line, which a terminal cuts behind the last value that it has room for, above the bar of what is left."""
        seconds = values.get("step_seconds")
        left = "" if seconds is None else format_left(self._steps - step, seconds)
        head = f"{self._title}step {step}/{self._steps}  {left and f'{left}  '}"
        width = None if self._progress is None else self._terminal.width - len(head)
        self._terminal.print(f"{head}{format_record(values, width)}", markup=False, highlight=False)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=left, refresh=True)

    def say(self, text: str) -> None:
        """Print a line above the live one, broken between words by a narrower terminal; several stay as they are."""
        said = f"{self._title}{text}"
        if self._progress is not None and "\n" not in said:
            said = readable(said, self._terminal.width)
        self._terminal.print(said, markup=False, highlight=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
