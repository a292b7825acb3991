"""dry_run=true: what a scheduler would be given."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from src.cluster.backend import backend_of
from src.config.tree import Tree
from src.launch.start import by_cluster, shapes

if TYPE_CHECKING:
    from src.planning.plan import Plan
    from src.run import Run


def scripts(points: "Sequence[tuple[Tree, Run, Plan]]") -> list[str]:
    """One text for all points of one cluster; none for points of this machine."""
    clusters = by_cluster(points, lambda point: point[1].cluster)
    texts = [backend_of(same[0][1].cluster).script(shapes(same)) for same in clusters]
    return [text for text in texts if text]
