"""The points of a sweep, one after the other, each in its own folder."""

import sys
from typing import TYPE_CHECKING

from src.cluster.start import start
from src.config.tree import Tree, identity
from src.errors import UserError

if TYPE_CHECKING:
    from src.train.plan import Plan
    from src.train.run import Run


def sweep(points: "list[tuple[Tree, Run, Plan]]") -> int:
    """The first code that is not 0: a point that fails does not stop the later ones, a stop ends all."""
    failed: dict[str, int] = {}
    for number, (tree, run, _) in enumerate(points, start=1):
        label = f"[{number}/{len(points)}] {run.name}-{identity(tree)}"
        print(label, file=sys.stderr)
        try:
            status, code = start(tree, run)
        except UserError as error:
            print(*error.problems, sep="\n", file=sys.stderr, flush=True)
            status, code = "refused", error.exit_code
        if code:
            failed[label] = code
        if status in ("stopped", "killed"):
            break
    print(*(f"{label} ended with code {code}" for label, code in failed.items()), sep="\n", file=sys.stderr)
    return next(iter(failed.values()), 0)
