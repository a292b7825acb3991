"""The lines of a figure as numbers: one for each config, averaged over its seeds."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.config.wording import unknown
from src.errors import FolderError, UserError, some
from src.metrics.curve import at_tokens
from src.metrics.history import History, Series, read
from src.metrics.history import borders as stage_borders
from src.metrics.names import metric_name
from src.runs.commands.figures.groups import Group
from src.runs.commands.summary import Summary, read_plan


@dataclass(frozen=True)
class Curve:
    """One line; `deviation`: sample standard deviation over its runs at each point, none of one run."""

    label: str
    runs: tuple[str, ...]  # names
    x: list[float]
    mean: list[float]
    deviation: list[float] | None
    borders: tuple[float, ...] = ()  # where stages begin, of the first of its runs


def _steps(_: Path, __: History, series: Series) -> list[float]:
    return [float(step) for step in series.steps]


def _tokens(_: Path, history: History, series: Series) -> list[float] | None:
    tokens = history.series.get("tokens")
    return None if tokens is None else at_tokens(series, tokens)


def _hours(_: Path, history: History, series: Series) -> list[float] | None:
    if not history.times.steps:
        return None
    import numpy

    begin, times = history.times.values[0], history.times
    return [float(each - begin) / 3600 for each in numpy.interp(series.steps, times.steps, times.values)]


def _flops(folder: Path, history: History, series: Series) -> list[float] | None:
    of_token, tokens = read_plan(folder).get("flops_per_token"), _tokens(folder, history, series)
    return None if tokens is None or not isinstance(of_token, int) else [each * of_token for each in tokens]


# What may lie under a curve, with its title. Tokens, hours and FLOPs are those of all ranks since the run began.
AXES: Mapping[str, tuple[str, Callable[[Path, History, Series], list[float] | None]]] = {
    "step": ("step", _steps),
    "tokens": ("tokens", _tokens),
    "hours": ("hours since the first line of the log", _hours),
    "flops": ("FLOPs of the model", _flops),
}


def curves(groups: Sequence[Group], x: str, y: str) -> tuple[list[Curve], list[str]]:
    """A line for each group, and what a reader should know of them: seeds that end before others.

    UserError for an axis or a metric that there is not; FolderError for seeds that share no step.
    """
    if x not in AXES:
        raise UserError(f"x={x}: {unknown(x, AXES, 'axis')}")
    runs = [run for group in groups for run in group.runs]
    histories = {run: read(run.folder) for run in runs}
    lacking = [run for run in runs if y not in histories[run].series]
    if len(lacking) == len(runs):
        there = {name for history in histories.values() for name in history.series}
        raise FolderError(f"y={y}: no run has it" + (f"; there are {some(there, most=20)}" if there else ""))
    notes = [f"{run.name}: has no {y}, and is left out" for run in lacking]
    found = []
    for group in groups:
        kept = {run: histories[run] for run in group.runs if run not in lacking}
        if kept:
            curve, told = _mean(group.label, kept, x, y)
            found.append(curve)
            notes += told
    return found, notes


def _mean(label: str, histories: Mapping[Summary, History], x: str, y: str) -> tuple[Curve, list[str]]:
    """At the steps that all runs have: a mean of other runs from point to point would show who left, not a loss."""
    by_step = []
    for run, history in histories.items():
        series = history.series[y]
        at = AXES[x][1](run.folder, history, series)
        if at is None:
            raise UserError(f"x={x}: {run.name} has no such numbers; take x=step")
        by_step.append(dict(zip(series.steps, zip(at, series.values, strict=True), strict=True)))
    shared = [step for step in by_step[0] if all(step in each for each in by_step)]
    names = tuple(run.name for run in histories)
    if not shared:
        raise FolderError(f"y={y}: {some(names)} have no step in common; label=seed draws each by itself")
    ends = {run.name: max(each) for run, each in zip(histories, by_step, strict=True)}
    early = [name for name, end in ends.items() if end < max(ends.values())]
    notes = [f"{name}: ends at step {ends[name]}, and so does the mean of {label}" for name in early]
    places, values = ([[each[step][part] for each in by_step] for step in shared] for part in (0, 1))
    deviation = [_deviation(each) for each in values] if len(by_step) > 1 else None
    ((first, history), *_) = histories.items()
    borders = tuple(AXES[x][1](first.folder, history, Series([*stage_borders(history).values()])) or ())
    x_means, y_means = [statistics.fmean(each) for each in places], [_average(each) for each in values]
    return Curve(label, names, x_means, y_means, deviation, borders), notes


def _average(values: Sequence[float]) -> float:
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.nan


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def title(y: str) -> str:
    """validation loss (nats per token)"""
    known = metric_name(y)
    return y.replace("_", " ") + (f" ({known.unit})" if known is not None and known.unit else "")
