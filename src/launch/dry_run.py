"""dry_run=true: what a scheduler would be given."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from src.cluster.backend import backend_of
from src.config.tree import Tree, identity
from src.runs.folder import group_folder, place

if TYPE_CHECKING:
    from src.planning.plan import Plan
    from src.run import Run


def scripts(points: "Sequence[tuple[Tree, Run, Plan]]") -> list[str]:
    """One text for all points of one cluster; none for points of this machine."""
    texts: list[str] = []
    left = list(points)
    while left:
        cluster = left[0][1].cluster
        same = [point for point in left if point[1].cluster == cluster]
        left = [point for point in left if point[1].cluster != cluster]
        shapes = [(folder, plan.to_dict()) for tree, run, plan in same for folder in _folders(tree, run)]
        texts.append(backend_of(cluster).script(shapes))
    return [text for text in texts if text]


def _folders(tree: Tree, run: "Run") -> list[Path]:
    """A job's for each: of the run, or of its replica groups."""
    whole, options = place(run.root, run.name, identity(tree), run.folder), run.fault_tolerance
    return [group_folder(whole, number) for number in range(options.copies)] if options.on else [whole]
