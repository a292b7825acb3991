"""`best` and `compare`: runs by one of their numbers; how they differ, what they brought, a page of their curves."""

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from src.cluster.batch_system import batch_system
from src.config.groups import SECTIONS
from src.config.presets import nearest_option
from src.config.tree import SITE, Tree, leaves_of
from src.errors import FolderError, UserError, some
from src.metrics.history import Series, read
from src.runs.commands.listing import print_json, short
from src.runs.commands.summary import Summary
from src.storage.streams import broken
from src.sweeps.commands import WIDEST, folding, terminal
from src.sweeps.ledger import SweepPoint
from src.sweeps.report.page import write_page
from src.sweeps.status import RunStatus, Submission, job_states, status_of

FEW = 3  # keys that colour and dash curves on the page, and have a plot of their own


def compare(runs: Sequence[Summary], page: Path, *, as_json: bool) -> int:
    """Two tables, or JSON, and the page."""
    if len(runs) < 2:
        raise FolderError(f"compare: {len(runs)} run; name two or more, a sweep, or conditions such as model=llama3_8b")
    differs = differing(runs)
    points, keys = side_by_side(runs, differs), list(differs)
    numbers = {run.name: _numbers(run, now) for run, (_, now) in zip(runs, points, strict=True)}
    try:
        written = write_page(page, f"{len(runs)} runs", command(runs), points, keys[:FEW])
    except OSError as error:
        raise FolderError(f"{page}: cannot be written ({error.strerror}); pass --page elsewhere.html") from error
    if as_json:
        print_json({"runs": numbers, "config": differs, "page": written})
        return 0
    screen = terminal()
    if keys:
        screen.print(_table("config", {key: differs[key] for key in keys}, runs))
    else:
        screen.print("their configs are the same")
    known = list(dict.fromkeys(name for each in numbers.values() for name in each))
    cells = {name: [_shown(numbers[run.name].get(name)) for run in runs] for name in known}
    screen.print(_table("numbers", cells, runs))
    screen.print(f"curves: {written}", highlight=False)
    return 0


def command(runs: Sequence[Summary]) -> str:
    """What makes this page again."""
    return shlex.join(["python", "-m", "src.runs", "compare", *(str(run.folder) for run in runs)])


def side_by_side(runs: Sequence[Summary], differs: Mapping[str, Sequence[str]]) -> list[tuple[SweepPoint, RunStatus]]:
    """Runs as a page takes them, with every number of each over all of its attempts. `differs`: of `differing`."""
    scheduler = batch_system()
    handed = [Submission(run.folder, scheduler, submitted=None, refused=None, cancelled=False) for run in runs]
    jobs = job_states(handed)
    points = [_point(run, at, {key: cells[at] for key, cells in differs.items()}) for at, run in enumerate(runs)]
    return [(point, status_of(each, jobs.get(each.folder))) for point, each in zip(points, handed, strict=True)]


def _point(run: Summary, number: int, overrides: dict[str, str]) -> SweepPoint:
    """A run as the page takes it: values without the quotes of JSON."""
    plain = {key: text.strip('"') for key, text in overrides.items()}
    return SweepPoint(number + 1, run.name, run.folder, plain)


def _numbers(run: Summary, now: RunStatus) -> dict[str, Any]:
    spent = now.goodput
    return {
        "state": now.state,
        "step": now.step,
        "steps": run.steps,
        "tokens": run.tokens,
        "loss": run.loss,
        "validation loss": run.validation_loss,
        "tok/s/device": now.tokens_per_second,
        "goodput": spent.share,
        "hours": spent.total / 3600,
        "attempts": now.attempts,
        "layout": run.layout,
        "parameters": run.parameters,
    }


def _shown(value: Any) -> str:
    if isinstance(value, float) or (isinstance(value, int) and value >= 10_000):
        return short(value) if abs(value) >= 10_000 else f"{value:.4g}"
    return "" if value is None else str(value)


def _table(title: str, rows: dict[str, list[str]], runs: Sequence[Summary]) -> Table:
    found = folding(title, *(run.name for run in runs))
    for name, cells in rows.items():
        found.add_row(name, *cells)
    return found


@dataclass(frozen=True)
class Ranked:
    """One run's number: the last, and the best with its step."""

    run: Summary
    last: float
    best: float
    step: int


def best(runs: Sequence[Summary], metric: str, *, highest: bool, as_json: bool) -> int:
    """Exit code 1 where no run has the number; a run whose last one is not finite comes last."""
    histories = {run: read(run.folder).series for run in runs}
    found = ranked({run: series[metric] for run, series in histories.items() if metric in series}, highest=highest)
    if not found:
        there = {name for series in histories.values() for name in series}
        print(f"{metric}: no run has it" + (f"; there are {some(there, most=20)}" if there else ""), file=sys.stderr)
        return 1
    varied = differing([each.run for each in found])
    if as_json:
        print_json([
            {"name": each.run.name, "folder": each.run.folder, "state": each.run.state, metric: each.last,
             "best": each.best, "step": each.step, "config": {key: values[place] for key, values in varied.items()}}
            for place, each in enumerate(found)
        ])  # fmt: skip
        return 0
    show_ranking(terminal(), found, metric, varied)
    return 0


def show_ranking(screen: Console, found: Sequence["Ranked"], metric: str, varied: Mapping[str, Sequence[str]]) -> None:
    """A row for each run, with a column for each key in which they differ; where these are too many for the screen, a
    paragraph for each run below the table.
    """
    table = _ranking(found, metric, varied)
    if screen.measure(table, options=screen.options.update(width=WIDEST)).maximum <= screen.width:
        screen.print(table)
        return
    screen.print(_ranking(found, metric, {}))
    for place in range(len(found)):
        words = " ".join(f"{key}={cells[place]}" for key, cells in varied.items() if cells[place])
        screen.print(broken(f"  {place + 1}   {words}", screen.width), highlight=False)


def _ranking(found: Sequence["Ranked"], metric: str, varied: Mapping[str, Sequence[str]]) -> Table:
    table = folding("", "run", "state", metric, "best", "at step", *varied)
    for place, each in enumerate(found):
        facts = (each.run.name, each.run.state, f"{each.last:.6g}", f"{each.best:.6g}", f"{each.step:,}")
        table.add_row(str(place + 1), *facts, *(cells[place] for cells in varied.values()))
    return table


def ranked(series: Mapping[Summary, Series], *, highest: bool) -> list[Ranked]:
    """By the last value, best first."""
    sign = -1.0 if highest else 1.0

    def key(value: float) -> float:
        return sign * value if math.isfinite(value) else math.inf

    found = []
    for run, each in series.items():
        step, value = min(zip(each.steps, each.values, strict=True), key=lambda pair: key(pair[1]))
        found.append(Ranked(run, each.values[-1], value, step))
    return sorted(found, key=lambda each: key(each.last))


def differing(runs: Sequence[Summary]) -> dict[str, list[str]]:
    """In what the configs differ, with each run's value as JSON, "" where it has none: groups of which they have other
    options of conf/, and keys in which one of them differs from its option.
    """
    trees = [_tree(run) for run in runs]
    groups = [group for group in SECTIONS if group not in SITE]
    nearest = [
        {group: nearest_option(group, tree[group]) for group in groups if isinstance(tree.get(group), Mapping)}
        for tree in trees
    ]
    columns = {group: [each[group][0] if group in each else "" for each in nearest] for group in groups}
    away = [f"{group}.{key}" for each in nearest for group, (_, keys) in each.items() for key in keys]
    values = [leaves_of(tree) for tree in trees]
    for key in dict.fromkeys([*away, "seed"]):
        columns[key] = [json.dumps(each[key], default=str) if key in each else "" for each in values]
    return {key: cells for key, cells in columns.items() if len(set(cells)) > 1}


def _tree(run: Summary) -> Tree:
    try:
        return run.config
    except UserError:
        return {}
