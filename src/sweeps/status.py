"""Status of a sweep point (queued, running, finished, failed, diverged ...).

Derived each time from the scheduler's job states, the attempts in the run folder and its metrics; nothing is stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from src.cluster.slurm import client
from src.cluster.slurm.packing import left
from src.metrics.goodput import Goodput, goodput
from src.metrics.history import History, Series, read
from src.runs.folder import Attempt, attempts
from src.runs.lock import Lock

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
_RUNNING = frozenset(("RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING"))


@dataclass(frozen=True)
class Submission:
    """What a ledger knows of a point beside its config."""

    folder: Path
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


def job_states(folders: Sequence[Path]) -> dict[str, str] | None:
    """SLURM's word for each folder's newest job; None when it does not answer, {} when none was ever submitted."""
    jobs = [earlier[-1]["job"] for folder in folders if (earlier := client.submissions(folder))]
    if not jobs:
        return {}
    try:
        return client.states(jobs)
    except client.SilentError:
        return None


def status_of(point: Submission, jobs: Mapping[str, str] | None) -> RunStatus:
    """`jobs` as `job_states` gives them."""
    tried, handed = attempts(point.folder), client.submissions(point.folder)
    job = handed[-1]["job"] if handed else None
    state, detail = _state(point, tried, job, jobs)
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


def _state(
    point: Submission, tried: list[Attempt], job: str | None, jobs: Mapping[str, str] | None
) -> tuple[State, str]:
    if any(each.ended == "finished" for each in tried):
        return "finished", ""
    word = (jobs or {}).get(job or "")
    if word is not None and word not in client.ENDED and not left(point.folder):
        return ("running" if word in _RUNNING else "queued"), word
    if Lock(point.folder / "lock", client.SlurmScheduler()).held():
        return "running", ""
    if point.cancelled:
        return "cancelled", ""
    if job is not None and jobs is None:
        return "queued", f"SLURM does not answer; job {job} may live"
    if not tried:
        if point.refused is not None:
            return "refused", point.refused
        return ("missing", "") if job is None else ("lost", f"job {job} left without a start; see its log")
    return _ending(tried[-1])


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
