"""What saves and restarts of a run have cost so far, as its own log says."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from src.storage.json_lines import METRICS_FILE, Lines


@dataclass(frozen=True)
class Interruptions:
    """Seconds; None: it has not happened yet."""

    save: float | None  # that training stands still for a checkpoint
    restart: float | None  # from the start of a process to the end of its first step


NOTHING_MEASURED = Interruptions(None, None)


def measured_interruptions(folder: Path) -> Interruptions:
    """Medians over what the run in `folder` has logged; nothing where it has not begun."""
    lines = list(Lines(folder / METRICS_FILE).read())

    def typical(name: str) -> float | None:
        found = [float(line[name]) for line in lines if name in line]
        return median(found) if found else None

    return Interruptions(typical("checkpoint/stall_seconds"), typical("startup/total_seconds"))
