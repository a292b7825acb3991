"""Submissions of a run: each time that it was handed to a scheduler, as slurm.jsonl has it (its name since 0.1)."""

from pathlib import Path
from typing import Any

from src.runs.folder import attempts
from src.runs.records import SUBMISSIONS_FILE
from src.storage.json_lines import Lines


def submissions(folder: Path) -> list[dict[str, Any]]:
    """Oldest first: `job`, `submitted` (seconds since 1970), `log`, `resources`, `packed`: its job runs others, too."""
    return list(Lines(folder / SUBMISSIONS_FILE).read())


def ended_in_shared_job(folder: Path) -> bool:
    """Whether a run is over although the job that it shared with others may live."""
    handed, tried = submissions(folder), attempts(folder)
    if not (handed and tried and handed[-1].get("packed")):
        return False
    same = tried[-1].job == handed[-1]["job"]
    return same and tried[-1].ended in ("finished", "failed")
