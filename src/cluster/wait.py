"""cluster.wait=true: a table of the runs in a scheduler's hands, until the last one has ended."""

import time
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class QueueStatus:
    """How a run stands."""

    state: str  # the scheduler's word; "finished", "failed" ... once it has ended
    attempts: int
    step: int | None
    loss: float | None
    ended: bool


def wait(runs: Sequence[Submitted], scheduler: JobScheduler, poll_seconds: float = POLL_SECONDS) -> AttemptOutcome:
    """Returns when no run is queued or running. Ctrl-C leaves the jobs alone."""
    unseen = dict.fromkeys((run.job for run in runs), 0)
    with Live(console=Console(stderr=True), auto_refresh=False) as live:
        while True:
            states = _states(scheduler, list(unseen))
            for job in unseen:
                unseen[job] = 0 if states is None or (job in states and states[job].live) else unseen[job] + 1
            standings = [queue_status(run, states, gone=unseen[run.job] >= GONE_POLLS) for run in runs]
            live.update(_table(runs, standings), refresh=True)
            if all(each.ended for each in standings):
                break
            time.sleep(poll_seconds)
    failed = [each for each in standings if each.state != "finished"]
    return AttemptOutcome("failed", 1) if failed else AttemptOutcome("finished", 0)


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
