"""What metrics.jsonl already has of an evaluation, so that each is made once, however often its step is."""

from collections.abc import Sequence
from pathlib import Path

from src.storage.json_lines import METRICS_FILE, Lines


def unscored(folder: Path, tasks: Sequence[str], step: int) -> list[str]:
    """Tasks without a score of the weights after this step; none where the step itself has no line.

    A life that was killed before it saved takes its steps again, mostly to the same bits: the scores stand where loss,
    gradient norm and learning rate of the step are those that were recorded before them. After a rewind, or under
    another layout, they differ, and the tasks are asked again.
    """
    now: tuple[float, ...] | None = None
    scored: dict[str, tuple[float, ...] | None] = {}
    for line in Lines(folder / METRICS_FILE).read():
        if line.get("step") != step:
            continue
        if "loss" in line:
            now = tuple(line.get(name, 0.0) for name in ("loss", "grad_norm", "lr"))
        scored |= {task: now for task in tasks if f"evaluate/{task}/seconds" in line}
    return [] if now is None else [task for task in tasks if scored.get(task) != now]
