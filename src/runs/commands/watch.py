"""`watch`: one run, live, over any terminal: numbers, the loss so far, the last lines of its log."""

import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from src.entry import raise_again
from src.metrics.console import format_left, format_record
from src.runs.commands.listing import age
from src.runs.commands.show import commands
from src.runs.commands.summary import Summary, summaries
from src.runs.folder import attempts, log_folder
from src.storage.json_lines import METRICS_FILE, Lines
from src.sweeps.commands import COLOURS, terminal

POLL_SECONDS = 2.0
LOG_LINES, LOG_BYTES = 8, 8192
BARS = "▁▂▃▄▅▆▇█"
BROKEN = ("failed", "diverged", "lost", "refused")


def watch(folder: Path, *, once: bool, as_json: bool, poll_seconds: float = POLL_SECONDS) -> int:
    """Until the run ends, or Ctrl-C, which leaves the run alone; exit code 1 where it has failed.

    A terminal sees one picture change; a file or a pipe gets a line for each change.
    """
    raise_again()
    screen, before = terminal(), ""
    try:
        with Live(console=screen, auto_refresh=False, transient=True) as live:
            while True:
                (run,) = summaries([folder])
                if screen.is_terminal and not as_json:
                    live.update(picture(run), refresh=True)
                elif (now := _facts(run) if as_json else line(run)) != before:
                    print(before := now, flush=True)
                if once or not run.live:
                    break
                time.sleep(poll_seconds)
    except KeyboardInterrupt:
        print("nobody watches any more; the run goes on", file=sys.stderr)
        return 0
    if screen.is_terminal and not as_json:
        screen.print(picture(run))
    return 1 if run.state in BROKEN else 0


def line(run: Summary) -> str:
    """State, step and numbers of now."""
    steps = "" if run.step is None else f"  step {run.step}/{run.steps or '?'}"
    detail = f"  {run.detail}" if run.detail else ""
    return f"{run.name}  {run.state}{steps}  {_numbers(run)}".rstrip() + detail


def _facts(run: Summary) -> str:
    """A line of JSON, without what changes by itself."""
    return json.dumps({key: value for key, value in run.to_dict().items() if key != "age"}, default=str)


def picture(run: Summary) -> Panel:
    """A panel of what a person wants to see."""
    share = None if run.step is None or not run.steps else run.step / run.steps
    head = Text.assemble((run.state, COLOURS[run.state]), f"  step {run.step or 0:,}/{run.steps or '?'}")
    if share is not None:
        head.append(f"  {'━' * round(20 * share)}{'╌' * (20 - round(20 * share))} {share:.0%}")
    if run.live and (left := _left(run)):
        head.append(f"  {left}")
    if run.age is not None:
        head.append(f"  {age(run.age)} ago", style="yellow" if run.live and run.age > 600 else "dim")
    losses = [each["loss"] for each in Lines(run.folder / METRICS_FILE).recent() if "loss" in each][::-1]
    drawn = Text(f"loss {bars(losses)}  {losses[0]:.3f} to {losses[-1]:.3f}", style="cyan") if losses else Text()
    known = [Text(run.detail, style="red")] if run.detail else []
    log = [Text(each, overflow="ellipsis", no_wrap=True, style="dim") for each in log_lines(run.folder)]
    more = [Text(f"{what}: {text}", no_wrap=True) for what, text in commands(run).items() if what in ("stop", "go on")]
    title = f"{run.name}  {run.layout}  {run.where}"
    return Panel(Group(head, Text(_numbers(run)), drawn, *known, *log, *more), title=title, title_align="left")


def bars(values: Sequence[float], width: int = 48) -> str:
    """Heights of block characters, lowest to highest; of more than `width` values the means of equal parts."""
    finite = [each for each in values if each == each and abs(each) != float("inf")]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [len(finite) * number // count for number in range(count + 1)]
    means = [sum(finite[low:high]) / (high - low) for low, high in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((each - low) * scale)] for each in means)


def log_lines(folder: Path) -> list[str]:
    """The last lines that rank 0 of the newest attempt has written."""
    tried = attempts(folder)
    path = log_folder(folder, tried[-1].number if tried else 1) / "rank_0.log"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return list(deque((each for each in text.splitlines() if each.strip()), LOG_LINES))


def _numbers(run: Summary) -> str:
    newest = next((each for each in Lines(run.folder / METRICS_FILE).recent() if "loss" in each), {})
    shown = format_record({key: value for key, value in newest.items() if isinstance(value, int | float)})
    validation = "" if run.validation_loss is None else f"  validation {run.validation_loss:.4f}"
    return shown + validation + ("" if run.goodput is None else f"  goodput {run.goodput:.0%}")


def _left(run: Summary) -> str:
    pace = Lines(run.folder / METRICS_FILE).newest("step_seconds").get("step_seconds")
    known = pace is not None and run.step is not None and run.steps is not None
    return format_left(max(0, (run.steps or 0) - (run.step or 0)), float(pace or 0.0)) if known else ""
