"""What a dry run answers: tables for a person (dry_run=true), JSON (json) or the scheduler's batch scripts (script)."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from src.cluster.backend import backend_of
from src.config.composition.requests import ConfigPoint
from src.config.tree import Tree, swept
from src.launch.start import by_cluster, shapes
from src.storage.streams import ReaderMayLeave

if TYPE_CHECKING:
    from rich.table import Table

    from src.launch.rehearse import Rehearsal
    from src.planning.plan import Plan
    from src.run import Run

    Checked = tuple[ConfigPoint, Tree, Run, Plan]

NO_GPU = "there is no GPU here: memory is what a GPU would need"
MORE = "nothing was started; as JSON: dry_run=json; as a batch script: dry_run=script"


def scripts(points: "Sequence[tuple[Tree, Run, Plan]]") -> list[str]:
    """One text for all points of one cluster; none for points of this machine."""
    clusters = by_cluster(points, lambda point: point[1].cluster)
    texts = [backend_of(same[0][1].cluster).script(shapes(same)) for same in clusters]
    return [text for text in texts if text]


def show(points: "Sequence[Checked]") -> list[str]:
    """What was asked of these points; returns where ranks that were built disagree with a plan.

    JSON and scripts are on stdout, a person's tables on stderr, the last lines of the screen.
    """
    wanted = {point[2].dry_run for point in points}
    if "script" in wanted:
        texts = scripts([(tree, run, plan) for _, tree, run, plan in points])
        with ReaderMayLeave():
            print(*texts, sep="\n", end="")
        if not texts:
            print("dry_run=script: this cluster starts ranks itself, without a script", file=sys.stderr)
    built = [_rehearsed(run, plan) for _, _, run, plan in points]
    if "json" in wanted:
        with ReaderMayLeave():
            for (point, _, _, plan), each in zip(points, built, strict=True):
                print(json.dumps(_answers(point, plan, each), indent=2))
    if True in wanted:
        _tables(points, built)
    return [problem for each in built for rank in each or [] for problem in rank.problems]


def _rehearsed(run: "Run", plan: "Plan") -> "list[Rehearsal] | None":
    """Some ranks, built on this CPU; None where that was not asked for."""
    from src.launch.rehearse import rehearse
    from src.run import Rehearses

    if run.dry_run == "script" or not isinstance(run.task, Rehearses) or not run.task.rehearse:
        return None
    return rehearse(replace(run, recompute=plan.recompute), run.task.rehearse_ranks)


def _answers(point: ConfigPoint, plan: "Plan", built: "list[Rehearsal] | None") -> dict[str, object]:
    from src.launch import origins

    found = plan.to_dict() | {"origins": origins.by_key(point.tree, point.origins)}
    return found if built is None else found | {"rehearsal": [each.to_dict() for each in built]}


def _tables(points: "Sequence[Checked]", built: "Sequence[list[Rehearsal] | None]") -> None:
    from rich.console import Console

    from src.launch import origins
    from src.launch.rehearse import render as compared
    from src.planning.machines import has_gpu
    from src.planning.table import render

    terminal = Console(stderr=True, markup=False, emoji=False)
    if len(points) == 1:
        ((point, _, _, plan),) = points
        terminal.print(origins.render(point.tree, point.origins), render(plan))
    else:
        terminal.print(_summary(points))
        for line in dict.fromkeys(line for *_, plan in points for line in plan.warnings):
            terminal.print(f"warning: {line}", style="yellow")
    for each in built:
        if each is not None:
            terminal.print(compared(each))
    if not any(has_gpu(run, run.cluster.devices()) for _, _, run, _ in points):
        terminal.print(NO_GPU)
    terminal.print(MORE, soft_wrap=True)


def _summary(points: "Sequence[Checked]") -> "Table":
    """A row for each point of a sweep, named by the values in which it differs from the others."""
    from rich import box
    from rich.table import Table

    from src.planning.advice import told

    table = Table(title=f"{len(points)} points", title_justify="left", box=box.SIMPLE)
    table.add_column("point", overflow="fold")
    for heading in ("ranks", "tokens/step", "steps", "parameters", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    keys = swept([point.overrides for point, *_ in points])
    for point, _, _, plan in points:
        name = " ".join(f"{key}={point.overrides.get(key)}" for key in keys)
        ranks = f"{plan.groups} x {plan.world}" if plan.groups > 1 else f"{plan.world}"
        size = f"{plan.parameters / 1e6:,.1f} M"
        table.add_row(name, ranks, f"{plan.tokens_per_step:,}", f"{plan.steps:,}", size, told(plan.memory.peak))
    return table
