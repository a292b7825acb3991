"""A site's own speed: factors on the shares of a device's numbers, which bring predicted steps near measured ones."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from src.config.tree import read
from src.errors import UserError
from src.runs.records import PLAN_FILE
from src.storage.json_lines import METRICS_FILE, Lines

# Parts of a step that have a speed in common -> the shares of src/planning/time/devices.py that it is made of.
SPEEDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "arithmetic": (("products", "experts", "loss", "recompute"), ("products", "grouped", "grouped_float8", "float8")),
    "bytes": (("memory", "copies", "update"), ("memory", "casts", "update")),
    "links": (("tensor", "context", "travel", "exposed"), ("nvlink", "network")),
}
# Weight of "as before" beside the runs, in squared shares of a step: 5 % of one step alone hardly move a speed.
RIDGE = 0.003
FAR = 3.0  # times: what is farther off was no run on the planned device, such as one on a CPU


@dataclass(frozen=True)
class Measured:
    """One run: seconds of a step by part, as planned, and as it took."""

    name: str
    parts: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Fit:
    """Factors for cluster.time_factors, and the mean relative error of the steps before and after."""

    factors: dict[str, float]
    before: float
    after: float


def measured(folder: Path) -> Measured:
    """Of a run folder. UserError where there is no prediction or no measured step, where both are of different devices,
    or where factors were set already.
    """
    planned = json.loads(_text(folder / PLAN_FILE)).get("time")
    if planned is None:
        raise UserError(f"{folder}: its plan predicts no time; pass cluster.gpu_model when it is launched")
    if read(folder / "config.yaml")["cluster"].get("time_factors"):
        raise UserError(f"{folder}: cluster.time_factors were set; calibrate on runs that were planned without")
    parts = {name: float(planned["step"][name]) for parts, _ in SPEEDS.values() for name in parts}
    parts["rest"] = planned["step"]["seconds"] - sum(parts.values())
    seconds, expected = _seconds(folder), planned["step"]["seconds"]
    if not 1.0 / FAR <= seconds / expected <= FAR:
        raise UserError(
            f"{folder}: a step took {seconds:.3g} s, and its plan for {planned['gpu']} says {expected:.3g} s: beyond a "
            f"factor of {FAR:g} that is no speed of a site; pass runs on the device that they were planned for"
        )
    return Measured(folder.name, parts, seconds)


def fit(runs: Sequence[Measured]) -> Fit:
    """Least squares of relative errors over the speeds, held near 1."""
    rows = [[sum(run.parts[part] for part in parts) / run.seconds for parts, _ in SPEEDS.values()] for run in runs]
    missing = [1.0 - sum(run.parts.values()) / run.seconds for run in runs]  # of each measured second
    size = len(SPEEDS)
    matrix = [[sum(row[i] * row[j] for row in rows) + RIDGE * (i == j) for j in range(size)] for i in range(size)]
    change = _solved(matrix, [sum(row[i] * gap for row, gap in zip(rows, missing, strict=True)) for i in range(size)])
    times = [max(0.1, 1.0 + each) for each in change]  # seconds of each kind of part, against those planned
    after = [
        gap - sum(value * (time - 1.0) for value, time in zip(row, times, strict=True))
        for row, gap in zip(rows, missing, strict=True)
    ]
    factors = {
        share: round(1.0 / time, 3)
        for time, (_, shares) in zip(times, SPEEDS.values(), strict=True)
        for share in shares
        if round(1.0 / time, 3) != 1.0
    }
    return Fit(factors, sum(map(abs, missing)) / len(runs), sum(map(abs, after)) / len(runs))


def _seconds(folder: Path) -> float:
    """Of a measured step: the benchmark's mean, or the median of what a training run logged."""
    if (bench := folder / "bench.json").is_file():
        return float(json.loads(_text(bench))["step_seconds"])
    lines = Lines(folder / METRICS_FILE).read()
    found = [float(line["step_seconds"]) for line in lines if "step_seconds" in line]
    if not found:
        raise UserError(
            f"{folder}: no step was measured; pass a folder of task=bench, or of a run that has logged steps"
        )
    return median(found)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; pass run folders") from error


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss and Jordan; the matrix is positive definite, so no row changes places."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for place, row in enumerate(rows):
        row[:] = [value / row[place] for value in row]
        for other in rows:
            if other is not row:
                other[:] = [value - other[place] * own for value, own in zip(other, row, strict=True)]
    return [row[-1] for row in rows]
