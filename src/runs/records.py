"""What those who start ranks note in a run folder: when it was asked for, and every start and end."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from src.storage.json_lines import Lines

ATTEMPTS_FILE = "attempts.jsonl"  # a line for each start of the ranks, another for its end
CANCEL_FILE = "cancel"  # made in a folder: end this run, not its neighbours
PLAN_FILE = "plan.json"  # what was computed before the start; see src/planning/plan.py
SUBMISSIONS_FILE = "slurm.jsonl"  # a line for each time that the run was handed to a scheduler


@dataclass(frozen=True)
class AttemptSpan:
    """One attempt as its launcher saw it, in seconds since 1970; `ended` is None where nobody noted it."""

    started: float
    ended: float | None
    scheduled: bool = False  # it was in a scheduler's job, which starts again by itself


def spans(folder: Path) -> list[AttemptSpan]:
    """Start and end of every attempt, oldest first."""
    return [AttemptSpan(_seconds(each["started"]), _ended(each), bool(each.get("job"))) for each in starts(folder)]


def jobs(folder: Path) -> list[str]:
    """Ids of the scheduler's jobs that ran this run, oldest first. A requeued job keeps its id."""
    return list(dict.fromkeys(each["job"] for each in starts(folder) if each.get("job")))


def asked(folder: Path, otherwise: float | None = None) -> float | None:
    """When the run was first submitted, in seconds since 1970: the folder's record or `otherwise`, whichever is
    earlier.
    """
    return min([*submitted(folder)[:1], *([] if otherwise is None else [otherwise])], default=None)


def submitted(folder: Path) -> list[float]:
    """When the run was handed to a scheduler, each time, in seconds since 1970."""
    return [float(each["submitted"]) for each in Lines(folder / SUBMISSIONS_FILE).read() if "submitted" in each]


def starts(folder: Path) -> list[dict[str, Any]]:
    """Every start of the ranks with what was noted of its end, oldest first; lines that a crash broke are left out."""
    found: dict[int, dict[str, Any]] = defaultdict(dict)
    for line in Lines(folder / ATTEMPTS_FILE).read():
        if "number" in line:
            found[line["number"]].update(line)
    return [each for each in found.values() if "started" in each]


def _ended(attempt: Mapping[str, Any]) -> float | None:
    return None if attempt.get("ended") is None else _seconds(attempt["detail"].partition(" ")[0])


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
