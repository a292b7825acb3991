"""incidents.jsonl: every step whose loss or gradient was not finite, and what was done about it."""

import logging
import time
from collections.abc import Iterable
from pathlib import Path

from src.storage.json_lines import Lines

logger = logging.getLogger(__name__)

INCIDENTS_FILE = "incidents.jsonl"


def write_incident(
    folder: Path, *, step: int, decision: str, loss: float, grad_norm: float, samples: Iterable[int]
) -> None:
    """Append one line. Never raises: training must act on the step whether or not it could be recorded."""
    try:
        Lines(folder / INCIDENTS_FILE).append(
            {
                "step": step,
                "time": round(time.time(), 3),
                "decision": decision,
                "loss": loss,
                "grad_norm": grad_norm,
                "samples": list(samples),
            }
        )
    except OSError as error:
        logger.warning("%s cannot be written: %s", folder / INCIDENTS_FILE, error)
