"""parallel=auto on the launcher: a run's config gets the layout, micro-batch and recomputation that were chosen."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from src.config.tree import Tree
from src.launch.kept_layout import check_name, keep

if TYPE_CHECKING:
    from src.planning.auto_layout import Decision

AUTO = "src.planning.auto_layout.AutoLayout"
LAYOUT = "src.distributed.parallel_dims.ParallelDims"


def decided(tree: Tree, typed: Mapping[str, str]) -> Tree:
    """`tree`, with a layout in the place of parallel=auto; the best that were found are shown on stderr."""
    section = tree.get("parallel")
    if not isinstance(section, dict) or section.get("_target_") != AUTO:
        return tree
    from src.config.build import build
    from src.planning.auto_layout import decide
    from src.run import Run

    run = Run.from_sections(build(tree))
    name, measured = section.get("write"), section.get("place") is not None
    if name is not None:
        check_name(str(name), measured=measured)
    made = decide(run, typed, run.cluster.devices())
    chosen = made.chosen.load
    layout = {"_target_": LAYOUT, **made.degrees.model_dump(mode="json")}
    recompute = {**tree["recompute"], **chosen.recompute.model_dump()}
    if made.place == 1:  # the table is that of every place
        _show(made, "each is measured" if measured else "the first is taken")
    if name is not None and not measured:
        evidence = [
            f"Chosen by parallel=auto for {made.gpus} x {made.gpu}: {made.speed(made.chosen):,.0f} tokens/s/GPU "
            "predicted,",
            f"with task.micro_batch={chosen.micro_batch} and recompute {chosen.recompute}.",
        ]
        keep(str(name), made.degrees, evidence)
    changed = {"parallel": layout, "recompute": recompute}
    return tree | changed | {"task": tree["task"] | {"micro_batch": chosen.micro_batch}}


def _show(made: "Decision", then: str) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"parallel=auto: the fastest layouts of {made.gpus} x {made.gpu}, predicted; {then}"
    table = Table(title=title, title_justify="left")
    for name in ("layout", "s a step", "tokens/s/GPU", "GiB", "most of the rest"):
        table.add_column(name, justify="left" if name in ("layout", "most of the rest") else "right")
    for found in made.found:
        step = found.step
        share = step.parts[step.limit] / step.seconds
        table.add_row(
            found.text,
            f"{step.seconds:.3g}",
            f"{made.speed(found):,.0f}",
            f"{found.peak / 2**30:.1f}",
            f"{step.limit} {share:.0%}",
        )
    Console(stderr=True, markup=False, emoji=False).print(table)
