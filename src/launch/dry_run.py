"""dry_run=true: what SLURM would be given."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from src.config.tree import Tree, identity
from src.runs.folder import group_folder, place

if TYPE_CHECKING:
    from src.planning.plan import Plan
    from src.run import Run


@runtime_checkable
class Writes(Protocol):
    """A cluster that is given a text."""

    def script(self, points: Sequence[tuple[Path, Mapping[str, Any]]]) -> str: ...


def scripts(points: "Sequence[tuple[Tree, Run, Plan]]") -> list[str]:
    """One text for each job or job array; none for points of this machine."""
    texts: list[str] = []
    left = [point for point in points if isinstance(point[1].cluster, Writes)]
    while left:
        cluster: Any = left[0][1].cluster
        same = [point for point in left if point[1].cluster == cluster]
        left = [point for point in left if point[1].cluster != cluster]
        shapes = [(folder, plan.to_dict()) for tree, run, plan in same for folder in _folders(tree, run)]
        texts.append(cluster.script(shapes))
    return texts


def _folders(tree: Tree, run: "Run") -> list[Path]:
    """A job's for each: of the run, or of its replica groups."""
    whole, options = place(run.root, run.name, identity(tree), run.folder), run.fault_tolerance
    return [group_folder(whole, number) for number in range(options.copies)] if options.on else [whole]
