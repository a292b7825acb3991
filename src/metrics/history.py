"""Reads metrics.jsonl into series, also of a run that was killed and resumed many times."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from src.storage.json_lines import METRICS_FILE, Lines

RESERVED = {"step", "attempt", "event"}
TIME = "time"


@dataclass(frozen=True)
class Series:
    """One metric by step, in rising order; steps that a later attempt repeated are replaced."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class History:
    attempts: int
    points_replaced: int  # recorded by an attempt that died, then computed again from the checkpoint before them
    series: dict[str, Series]
    times: Series = field(default_factory=Series)  # when each step was recorded, in seconds since 1970


def read(folder: Path) -> History:
    """The history of a run folder. An attempt that resumes at a step replaces what earlier attempts recorded from it
    on.
    """
    attempts, replaced = 0, 0
    points: dict[str, dict[int, float]] = defaultdict(dict)
    begun: dict[str, int] = {}  # the attempt that last wrote each metric
    for record in Lines(folder / METRICS_FILE).read():
        if not isinstance(record.get("attempt"), int):  # a line that no version of this project wrote
            continue
        attempts = max(attempts, record["attempt"])
        if "event" in record or not isinstance(record.get("step"), int):
            continue
        for name in record.keys() - RESERVED:
            if not isinstance(record[name], int | float):
                continue
            series = points[name]
            if begun.get(name, record["attempt"]) < record["attempt"]:
                for step in [step for step in series if step >= record["step"]]:
                    del series[step]
                    replaced += name != TIME
            begun[name] = record["attempt"]
            series[record["step"]] = float(record[name])
    times = _ordered(points.pop(TIME, {}))
    return History(attempts, replaced, {name: _ordered(series) for name, series in sorted(points.items())}, times)


def _ordered(points: dict[int, float]) -> Series:
    steps = sorted(points)
    return Series(steps, [points[step] for step in steps])


def borders(history: History) -> dict[int, int]:
    """Of a run in stages: number of each stage but the first -> the last step that was recorded of the one before."""
    stage = history.series.get("stage", Series())
    each = zip(stage.steps, stage.values, stage.values[1:], strict=False)
    return {int(after): step for step, before, after in each if after != before}
