"""cluster.wait=true: a table of the runs in a scheduler's hands, until the last one has ended."""

import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

from src.cluster.backend import AttemptOutcome, JobScheduler, JobState, SilentError
from src.cluster.submission import Submitted
from src.runs.folder import attempts
from src.storage.json_lines import Lines

POLL_SECONDS = 5.0
# SLURM forgets a job for a moment between its end and its requeue.
GONE_POLLS = 2
WIDEST = 10_000  # columns of a file


@dataclass(frozen=True)
class QueueStatus:
    """How a run stands."""

    state: str  # the scheduler's word; "finished", "failed" ... once it has ended
    attempts: int
    step: int | None
    loss: float | None
    ended: bool


def wait(runs: Sequence[Submitted], scheduler: JobScheduler, poll_seconds: float = POLL_SECONDS) -> AttemptOutcome:
    """Returns when no run is queued or running. Ctrl-C leaves the jobs alone.

    A terminal sees the table change; a file gets a line for each change. Both end with the whole table.
    """
    unseen = dict.fromkeys((run.job for run in runs), 0)
    width = None if sys.stderr.isatty() else WIDEST
    console = Console(stderr=True, markup=False, emoji=False, width=width)
    before: list[QueueStatus | None] = [None] * len(runs)
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                states = _states(scheduler, list(unseen))
                for job in unseen:
                    unseen[job] = 0 if states is None or (job in states and states[job].live) else unseen[job] + 1
                standings = [queue_status(run, states, gone=unseen[run.job] >= GONE_POLLS) for run in runs]
                if console.is_terminal:
                    live.update(_table(runs, standings), refresh=True)
                else:
                    print(*_changes(runs, before, standings), sep="", end="", file=sys.stderr, flush=True)
                before = [*standings]
                if all(each.ended for each in standings):
                    break
                time.sleep(poll_seconds)
    except KeyboardInterrupt:
        print("nobody waits any more; the jobs go on:", file=sys.stderr)
        print(*(f"{run.cancel}  # ends {run.folder.name}" for run in runs), sep="\n", file=sys.stderr)
        return AttemptOutcome("submitted", 128 + signal.SIGINT)
    console.print(_table(runs, standings))
    failed = [each for each in standings if each.state != "finished"]
    return AttemptOutcome("failed", 1) if failed else AttemptOutcome("finished", 0)


def _changes(
    runs: Sequence[Submitted], before: Sequence[QueueStatus | None], now: Sequence[QueueStatus]
) -> Iterator[str]:
    """A line for each run whose state or attempt is another than at the last look."""
    for run, old, new in zip(runs, before, now, strict=True):
        if old is None or (old.state, old.attempts) != (new.state, new.attempts):
            again = f", attempt {new.attempts}" if new.attempts > 1 else ""
            yield f"job {run.job}: {run.folder.name}: {new.state}{again}\n"


def queue_status(run: Submitted, states: Mapping[str, JobState] | None, *, gone: bool) -> QueueStatus:
    """From the scheduler while it knows the job, and from the run's own records after that."""
    tried = attempts(run.folder)
    last = Lines(run.folder / "metrics.jsonl").last() or {}
    step, loss = last.get("step"), last.get("loss")
    known = None if states is None else states.get(run.job)
    state = "unknown" if states is None else "gone" if known is None else known.word
    if gone:
        state = tried[-1].ended or state if tried else state
    return QueueStatus(state, len(tried), step, loss, gone)


def _states(scheduler: JobScheduler, jobs: list[str]) -> dict[str, JobState] | None:
    try:
        return scheduler.states(jobs)
    except SilentError:
        return None


def _table(runs: Sequence[Submitted], standings: Sequence[QueueStatus]) -> Table:
    table = Table("job", "run", "state", "attempts", "step", "loss", box=None)
    for run, each in zip(runs, standings, strict=True):
        step, loss = "" if each.step is None else str(each.step), "" if each.loss is None else f"{each.loss:.4f}"
        table.add_row(run.job, run.folder.name, each.state, str(each.attempts), step, loss)
    return table
