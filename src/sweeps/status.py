"""Status of a sweep point (queued, running, finished, failed, diverged ...).

Derived each time from the scheduler's job states, the attempts in the run folder and its metrics; nothing is stored.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from src.cluster.backend import JobScheduler, JobState, SilentError
from src.metrics.goodput import Goodput, goodput
from src.metrics.history import History, Series, read
from src.runs.folder import Attempt, attempts
from src.runs.lock import Lock
from src.runs.submissions import ended_in_shared_job, submissions

State = Literal[
    "missing",  # never handed over
    "refused",  # could not be started: its config, data or folder
    "queued",
    "running",
    "finished",
    "stopped",  # by a signal, after saving: goes on from there
    "lost",  # ended without a word: kill -9, power, a node
    "failed",
    "diverged",  # loss or gradients stopped being finite
    "cancelled",  # by the ledger
]
LIVE: frozenset[State] = frozenset(("queued", "running"))
# What the same command hands over again, and what only `retry` does.
OPEN: frozenset[State] = frozenset(("missing", "refused", "stopped", "lost"))
BROKEN: frozenset[State] = frozenset(("failed", "diverged"))
_SILENT = JobState("unknown", "the scheduler does not answer")


@dataclass(frozen=True)
class Submission:
    """What a ledger knows of a point beside its config."""

    folder: Path
    scheduler: JobScheduler  # of its cluster
    submitted: float | None  # seconds since 1970, the last time
    refused: str | None  # why
    cancelled: bool


@dataclass(frozen=True)
class RunStatus:
    """`loss` is the final validation loss, or the last training loss of a run that does not validate."""

    state: State
    detail: str
    job: str | None
    attempts: int
    step: int | None
    loss: float | None
    tokens_per_second: float | None  # of one device, mean over the kept steps
    goodput: Goodput


def job_states(points: Iterable[Submission]) -> dict[Path, JobState]:
    """Of each folder's newest job, where its scheduler still knows it; every scheduler is asked once."""
    newest: dict[JobScheduler, dict[Path, str]] = {}
    for point in points:
        if handed := submissions(point.folder):
            newest.setdefault(point.scheduler, {})[point.folder] = handed[-1]["job"]
    found: dict[Path, JobState] = {}
    for scheduler, jobs in newest.items():
        try:
            states = scheduler.states(jobs.values())
        except SilentError:
            found |= dict.fromkeys(jobs, _SILENT)
        else:
            found |= {folder: states[job] for folder, job in jobs.items() if job in states}
    return found


def status_of(point: Submission, newest: JobState | None) -> RunStatus:
    """`newest`: of its newest job, as `job_states` gives it."""
    tried, job = attempts(point.folder), _job(point)
    state, detail = state_of(point, tried, newest)
    history = read(point.folder)
    return RunStatus(
        state,
        detail,
        job,
        len(tried),
        _last_step(history),
        score(history),
        _mean(history.series.get("tokens_per_second", Series()).values[1:]),  # the first holds the compilation
        goodput(point.folder, point.submitted),
    )


def score(history: History) -> float | None:
    """The last validation loss, else the last training loss."""
    for name in ("validation_loss", "loss"):
        if values := history.series.get(name, Series()).values:
            return values[-1]
    return None


def state_of(point: Submission, tried: list[Attempt], newest: JobState | None) -> tuple[State, str]:
    """The state and what is known of it, from the run's attempts and its newest job."""
    if any(each.ended == "finished" for each in tried):
        return "finished", ""
    if newest is not None and newest.live and not ended_in_shared_job(point.folder):
        return ("running" if newest.phase == "running" else "queued"), newest.word
    if Lock(point.folder / "lock", point.scheduler).held():
        return "running", ""
    if point.cancelled:
        return "cancelled", ""
    if newest is _SILENT:
        return "queued", f"{newest.word}; job {_job(point)} may live"
    if not tried:
        if point.refused is not None:
            return "refused", point.refused
        return ("missing", "") if (job := _job(point)) is None else _never_began(point, job, newest)
    return _ending(tried[-1])


def _job(point: Submission) -> str | None:
    handed = submissions(point.folder)
    return handed[-1]["job"] if handed else None


def _never_began(point: Submission, job: str, newest: JobState | None) -> tuple[State, str]:
    """Of a job that its scheduler has done with, and that made no attempt: it has a log only if it was started."""
    if (log := Path(submissions(point.folder)[-1].get("log", ""))).is_file():
        return "lost", f"job {job} left without a start; see {log}"
    word = "left the queue" if newest is None else f"is {newest.word}"
    return "stopped", f"job {job} {word}: it was taken away before it began"


def _ending(newest: Attempt) -> tuple[State, str]:
    said = newest.detail.partition(" ")[2]  # the moment stands first
    if newest.ended == "failed":
        return ("diverged" if "DivergedError" in said else "failed"), said
    if newest.ended is None:
        return "lost", f"attempt {newest.number} on {newest.host} ended without a word"
    return "stopped", said


def _last_step(history: History) -> int | None:
    return max((series.steps[-1] for series in history.series.values() if series.steps), default=None)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
