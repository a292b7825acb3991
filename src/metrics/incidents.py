"""incidents.jsonl: every step whose loss or gradient was not finite or stood out, and what was done about it; beside
them what went wrong and was got over.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from src.storage.json_lines import Lines

logger = logging.getLogger(__name__)

INCIDENTS_FILE = "incidents.jsonl"


def write_incident(
    folder: Path,
    *,
    step: int,
    decision: str,
    loss: float,
    grad_norm: float,
    samples: Iterable[int],
    **more: float | None,
) -> None:
    """Append one line; `more`: what else is known. Never raises: training must act on the step whether or not it could
    be recorded.
    """
    _append(folder, step, decision, {"loss": loss, "grad_norm": grad_norm, **more, "samples": list(samples)})


def write_trouble(folder: Path, *, step: int, decision: str, words: str) -> None:
    """Append one line about something else than a step's numbers. Never raises."""
    _append(folder, step, decision, {"words": words})


def _append(folder: Path, step: int, decision: str, more: Mapping[str, Any]) -> None:
    try:
        record = {"step": step, "time": round(time.time(), 3), "decision": decision, **more}
        Lines(folder / INCIDENTS_FILE).append(record)
    except OSError as error:
        logger.warning("%s cannot be written: %s", folder / INCIDENTS_FILE, error)


def skipped_samples(folder: Path, *, after: int = 0) -> list[tuple[int, int]]:
    """First sample, and that behind the last, of each step whose update was left out because it stood out.

    `after`: a step; those up to it were numbered otherwise.
    """
    lines = (line for line in Lines(folder / INCIDENTS_FILE).read() if line.get("step", after + 1) > after)
    samples = [line["samples"] for line in lines if line.get("decision") in ("skip_batch", "rewind")]
    return [(each[0], each[-1] + 1) for each in samples if each]
