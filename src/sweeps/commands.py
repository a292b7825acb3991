"""`python -m src.sweeps <command> <sweep folder>`: look at a sweep, and act on some of its points."""

import argparse
import csv
import io
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from src.cluster.backend import JobScheduler, SilentError
from src.errors import ConfigError, FolderError, UserError
from src.metrics.goodput import duration
from src.runs.lock import Lock
from src.storage.atomic_write import atomic_write
from src.storage.streams import ReaderMayLeave, to_stderr
from src.sweeps.ledger import Ledger, SweepPoint
from src.sweeps.status import BROKEN, LIVE, OPEN, RunStatus, State

Row = tuple[SweepPoint, RunStatus]
RESAMPLED, FEWEST_RESAMPLED = 200, 40  # draws: with fewer, 95 % are a draw themselves
SHORTEST_WAIT = 1  # second between two pages of a report
WIDEST = 10_000  # columns: no value of a sweep is cut short in a file
COLOURS: dict[State, str] = {
    "finished": "green",
    "running": "cyan",
    "queued": "blue",
    "failed": "red",
    "diverged": "magenta",
    "lost": "red",
    "refused": "red",
    "stopped": "yellow",
    "missing": "yellow",
    "cancelled": "bright_black",
}


def status(ledger: Ledger) -> int:
    """How every point stands."""
    rows, swept = ledger.standings(), ledger.swept()
    jobs = ["job"] * any(now.job for _, now in rows)
    table = folding("#", "state", *swept, "run", "step", "loss", "attempts", *jobs, "what is known")
    for point, now in rows:
        state, values = Text(now.state, style=COLOURS[now.state]), [point.overrides.get(key, "") for key in swept]
        loss = "" if now.loss is None else f"{now.loss:.4f}"
        step = "" if now.step is None else str(now.step)
        facts = (point.folder.name, step, loss, str(now.attempts), *([now.job or ""] * len(jobs)), now.detail)
        table.add_row(str(point.number), state, *values, *facts)
    console = terminal()
    console.print(table)
    states = [now.state for _, now in rows]
    console.print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)), highlight=False)
    return 0


def table(ledger: Ledger) -> int:
    """What every point was and brought: on the terminal, and in table.csv for other programs."""
    rows = ledger.standings()
    swept = ledger.swept()
    shown = folding("#", "state", *swept, "final loss", "tok/s/device", "useful", "and the rest")
    for point, now in sorted(rows, key=lambda row: (row[1].loss is None, row[1].loss)):
        values = [point.overrides.get(key, "") for key in swept]
        share = "" if now.goodput.share is None else f"{100 * now.goodput.share:.0f}%"
        rate = "" if now.tokens_per_second is None else f"{now.tokens_per_second:,.0f}"
        parts = {part: seconds for part, seconds in now.goodput.to_dict().items() if part != "useful" and seconds >= 1}
        rest = " ".join(f"{part} {duration(seconds)}" for part, seconds in parts.items())
        loss = "" if now.loss is None else f"{now.loss:.4f}"
        shown.add_row(str(point.number), now.state, *values, loss, rate, share, rest)
    terminal().print(shown)
    print(f"written: {write_csv(ledger, rows)}", file=sys.stderr)
    return 0


def write_csv(ledger: Ledger, rows: Sequence[Row]) -> Path:
    """Every override and every number, a line per point."""
    path = ledger.path / "table.csv"
    keys = list(dict.fromkeys(key for point, _ in rows for key in point.overrides))
    with io.StringIO(newline="") as file:
        writer = csv.writer(file)
        parts = [f"{part}_seconds" for part in rows[0][1].goodput.to_dict()] if rows else []
        writer.writerow(
            ["number", "run", "state", *keys, "attempts", "step", "loss", "tokens_per_second", *parts, "folder"]
        )
        for point, now in rows:
            overrides = [point.overrides.get(key, "") for key in keys]
            seconds = [round(each, 3) for each in now.goodput.to_dict().values()]
            facts = [now.attempts, now.step, now.loss, now.tokens_per_second, *seconds, point.folder]
            writer.writerow([point.number, point.folder.name, now.state, *overrides, *facts])
        atomic_write(path, file.getvalue())
    return path


def retry(ledger: Ledger, numbers: Sequence[int]) -> int:
    """Hand over again what failed or is missing; points named by number also if they were cancelled."""
    from src.sweeps.grid import hand_over, ready

    rows = _chosen(ledger, numbers)
    again = OPEN | BROKEN | ({"cancelled"} if numbers else set())
    chosen = [point for point, now in rows if now.state in again]
    for point, now in rows:
        if numbers and point not in chosen:
            print(f"{point.number}: {now.state}, left alone", file=sys.stderr)
    if not chosen:
        print("nothing failed or missing", file=sys.stderr)
    os.chdir(ledger.home)
    entries, code = ready(ledger, chosen)
    return hand_over(ledger, entries) or code


def cancel(ledger: Ledger, numbers: Sequence[int]) -> int:
    """End what lives, after it has saved where it can, and keep what waits from being started."""
    code = 0
    for point, now in _chosen(ledger, numbers):
        if now.state not in LIVE | OPEN:
            continue
        ledger.cancelled(point)
        said = _end(point, now, ledger.scheduler(point)) if now.state in LIVE else None
        print(f"{point.number}: {said or 'cancelled'}", file=sys.stderr)
        code = code or (1 if said else 0)
    return code


def _end(point: SweepPoint, now: RunStatus, scheduler: JobScheduler) -> str | None:
    """What went wrong, if anything."""
    owner = Lock(point.folder / "lock").owner() or {}
    if (job := now.job or owner.get("job")) is not None:
        try:
            return scheduler.cancel(point.folder, job)
        except SilentError as error:
            print(f"{point.number}: job {job}: {error}; the process itself is told", file=sys.stderr)
    if not owner:
        return None  # it has ended meanwhile
    if owner.get("host") != socket.gethostname():
        return f"it runs on {owner.get('host')}: end process {owner.get('pid')} there"
    try:
        os.kill(int(owner["pid"]), signal.SIGTERM)
    except ProcessLookupError:
        return None
    except PermissionError:
        return f"process {owner['pid']} is another user's"
    return None


def extend(ledger: Ledger, more: Sequence[str]) -> int:
    """The sweep's own command with these values in place of its own for the same keys; what is there stays."""
    from src.config.composition.requests import asked
    from src.launch.start import ask_schedulers, checked
    from src.sweeps.grid import enter, in_group, names
    from src.sweeps.search import search
    from src.tasks.source import completed

    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.chdir(ledger.home)
    keys = {_key(each) for each in more}
    argv = [*(each for each in ledger.argv if _key(each) not in keys), *more]
    question = asked(argv if "-m" in argv else ["-m", *argv], completed)
    if question.space:
        return search(question, argv, ledger)
    points = checked(in_group(question.trees, ledger.path.name), names([point.overrides for point in question.points]))
    ask_schedulers(points)
    given = zip(points, question.points, strict=True)
    return enter(ledger, [(*checked_point, point.overrides) for checked_point, point in given])


def report(ledger: Ledger, every_seconds: float | None = None) -> int:
    """A page with plots that needs nothing but a browser."""
    from src.sweeps.report.page import write

    if every_seconds is not None and not SHORTEST_WAIT <= every_seconds < math.inf:
        raise ConfigError(f"--every={every_seconds:g}: seconds between two pages, at least {SHORTEST_WAIT}; --every=30")
    while True:
        write_csv(ledger, rows := ledger.standings())
        page = write(ledger, rows)
        if every_seconds is None or not any(now.state in LIVE for _, now in rows):
            break
        time.sleep(every_seconds)
    print(page)
    return 0


def fit(ledger: Ledger, left_out: Sequence[int] | None, resampled: int) -> int:
    """A scaling law through the finished runs, and what it foretells of one that is left out; drawn in the page."""
    from src.sweeps.fit import fitted, lines, write

    if resampled < FEWEST_RESAMPLED:
        raise ConfigError(
            f"--resampled={resampled}: of fewer than {FEWEST_RESAMPLED} draws the ends of 95 % are single draws; "
            f"pass --resampled={FEWEST_RESAMPLED} or more"
        )
    facts = fitted(ledger, left_out, resampled)
    write(ledger, facts)
    print(*lines(facts), sep="\n")
    return report(ledger)


def folding(*headings: str) -> Table:
    """A table in which what is too long for its column goes on below, instead of being cut."""
    table = Table(box=box.SIMPLE)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def terminal() -> Console:
    """As wide as the terminal; a file or a pipe wraps nothing."""
    width = None if sys.stdout.isatty() else WIDEST
    return Console(width=width, markup=False, emoji=False)


def _key(argument: str) -> str:
    return argument.lstrip("+~").partition("=")[0]


def _chosen(ledger: Ledger, numbers: Sequence[int]) -> list[Row]:
    rows = ledger.standings()
    if strangers := set(numbers) - {point.number for point, _ in rows}:
        raise FolderError(
            f"{ledger.path}: no point {', '.join(map(str, sorted(strangers)))}; there are 1 to {len(rows)}"
        )
    return [(point, now) for point, now in rows if not numbers or point.number in numbers]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m src.sweeps", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plain: dict[str, Callable[[Ledger], int]] = {"status": status, "table": table, "report": report}
    some: dict[str, Callable[[Ledger, Sequence[int]], int]] = {"retry": retry, "cancel": cancel}
    for name, act in {**plain, **some, "extend": extend, "fit": fit}.items():
        command = commands.add_parser(name, help=act.__doc__, description=act.__doc__)
        command.add_argument("folder", type=Path, help="<root>/sweeps/<name>-<hash>")
        if name in some:
            command.add_argument("numbers", type=int, nargs="*", help="of points; none: all that it may concern")
    commands.choices["extend"].add_argument(
        "overrides", nargs="+", help="such as optim.lr=3e-3,1e-2 or sweep.trials=40"
    )
    commands.choices["report"].add_argument(
        "--every", type=float, metavar="SECONDS", help="write it again so often, until no point is queued or running"
    )
    commands.choices["fit"].add_argument(
        "--leave-out", type=int, nargs="*", metavar="NUMBER", help="of runs to foretell; default: that of most compute"
    )
    commands.choices["fit"].add_argument(
        "--resampled", type=int, default=RESAMPLED, metavar="TIMES", help="draws of the runs that give the intervals"
    )
    given = parser.parse_args(arguments)
    try:
        ledger = Ledger.open(given.folder)
        if given.command in some:
            return some[given.command](ledger, given.numbers)
        with ReaderMayLeave():
            if given.command == "fit":
                return fit(ledger, given.leave_out, given.resampled)
            if given.command == "report":
                return report(ledger, given.every)
            return extend(ledger, given.overrides) if given.command == "extend" else plain[given.command](ledger)
    except UserError as error:
        to_stderr(error.problems)
        return error.exit_code
    return 0
